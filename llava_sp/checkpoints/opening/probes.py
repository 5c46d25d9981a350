"""What a backbone computes before its first and after its last layer, found by running these parts, not by name.

This finds the patches of a tower, and how a language model uses embeddings and logits. No layer runs, so it takes a
fraction of a second at any size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_sp.checkpoints.opening.fill import gathered
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM

_LOGITS = (1e-3, 1.0, -3.0, 20.0, 1e3, 1e8)  # small ones reveal a scale, large ones a cap


class HeadSteps(NamedTuple):
    """Steps after the head: softcap * tanh(scale * logits / softcap); None skips a step."""

    scale: float | None
    softcap: float | None


class _Reached(Exception):
    """The first layer was called; `args` are its arguments."""


class _Given(BaseModelOutputWithPast):
    """Hidden states in place of a decoder's output; all other fields are None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Instead(nn.Module):
    """Replaces a module: stores its first argument and returns a given result."""

    def __init__(self, module: nn.Module, result: Callable[[], Any]):
        super().__init__()
        self.result = result
        self.given: Any = None
        self.weight = getattr(module, "weight", None)

    @property
    def decoder(self) -> _Instead:  # for OPT, which calls its decoder
        return self

    def forward(self, *args, **kwargs):
        self.given = args[0] if args else None
        return self.result()


@torch.no_grad()
def leading_tokens(tower: PreTrainedModel, config: LlavaSPConfig) -> int | None:
    """The number of tokens (class token, registers) before the tower's patches.

    Changes single patches of an image; the tokens that change must be a grid, row by row, else None.
    """
    grid, size = config.grid_size, config.image_size
    side = size // grid
    places = sorted({0, grid - 1, grid * (grid - 1), grid**2 - 1})
    images = _blank(config, len(places) + 1)
    for image, place in zip(images[1:], places, strict=True):
        top, left = place // grid * side, place % grid * side
        image[:, top : top + side, left : left + side] = torch.linspace(-1, 1, side)
    called = _before_layers(tower, pixel_values=images.to(_device(tower), tower.dtype))
    tokens = next((one for one in called if isinstance(one, Tensor) and one.ndim == 3), torch.empty(0, 0, 0))
    leading = tokens.shape[1] - grid**2
    changed = (tokens[1:] - tokens[:1]).abs().sum(-1)
    if leading < 0 or changed.argmax(-1).tolist() != [leading + place for place in places]:
        return None
    return 0 if tower.config.model_type == "timm_wrapper" else leading  # timm's maps exclude them


def tower_problem(tower: PreTrainedModel, config: LlavaSPConfig) -> str | None:
    """Why the tokens that `config` selects are not the tower's patches, or None if they are."""
    leading, grid, name = leading_tokens(tower, config), config.grid_size, type(tower).__name__
    if leading is None:
        return f"the vision tower {name} does not give, after leading tokens, a grid of {grid} x {grid} patches, row by row"
    if leading == config.num_leading_tokens:
        return None
    return (
        f"{Path(config.name_or_path or '', 'config.json')}: vision_feature_select_strategy is {config.vision_feature_select_strategy!r} and "
        f"vision_tower_leading_tokens is {config.vision_tower_leading_tokens}, but the vision tower {name} gives {leading} "
        "tokens before its patches: images were shifted in training"
    )


@torch.no_grad()
def features_problem(tower: PreTrainedModel, empty: LlavaSPForCausalLM) -> str | None:
    """Why the tower's features do not fit the projector, or None if they do.

    Args:
        empty: the model on "meta", where a forward pass is free; the few towers that need values get a blank image.
    """
    config, give, found = empty.config, empty.model.get_patch_features, None
    expected, device = (config.num_patch_tokens, config.vision_width), _device(tower)
    with suppress(RuntimeError):
        found = tuple(give(_blank(config).to("meta")).shape[1:])
    if found is None:
        empty.model.vision_tower = tower
        with gathered([*tower.parameters()]), torch.device(device), suppress(RuntimeError):
            found = tuple(give(_blank(config).to(device)).shape[1:])
    if found == expected:
        return None
    return (
        f"layer {config.vision_feature_layer} of the vision tower {type(tower).__name__} gives {found} for an image of "
        f"{config.image_size} pixels; expected {expected[0]} patches of {expected[1]} values"
    )


@torch.no_grad()
def head_steps(language: PreTrainedModel) -> HeadSteps | None:
    """The steps of the language model after its head.

    None if they are not `HeadSteps`, or if the input of its layers depends on more than the embeddings.
    """
    with suppress(RuntimeError, TypeError, AttributeError, LookupError, AssertionError):
        if _takes_embeddings(language.base_model, language.get_input_embeddings()):
            return _head_steps(language)
    return None


def head_problem(language: PreTrainedModel, path: object) -> str | None:
    """Why a language model's answers would differ, or None if they would not."""
    if head_steps(language) is not None:
        return None
    return (
        f"language_model {path} is a {type(language).__name__}, which computes more than decoder(embeddings) and "
        "softcap(scale * linear(hidden)): the model's answers would differ. Use another language model"
    )


def _device(module: nn.Module) -> torch.device:
    """The device of inputs; accelerate moves those of offloaded modules."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def _blank(config: LlavaSPConfig, images: int = 1) -> Tensor:
    channels = getattr(config.vision_config, "num_channels", 3)
    return torch.zeros(images, channels, config.image_size, config.image_size, device="cpu")


def _takes_embeddings(base: nn.Module, embedding: nn.Module) -> bool:
    """Whether embeddings give the layers the same input as their ids do, and keys and values are cached."""
    if "past_key_values" not in inspect.signature(type(base).forward).parameters:  # Mamba
        return False
    ids = torch.arange(3, 7, device=_device(embedding))[None]
    with gathered([*embedding.parameters()]):
        embeds = embedding(ids)
    _before_layers(base, inputs_embeds=embeds + 1)  # image embeddings have no id; Gemma 3n looks it up
    return _same(_before_layers(base, input_ids=ids), _before_layers(base, inputs_embeds=embeds))


def _head_steps(language: PreTrainedModel) -> HeadSteps | None:
    """Runs a causal model's forward pass with fixed hidden states as decoder output, fixed logits as head output."""
    head, base = language.get_output_embeddings(), language.base_model
    hidden = torch.linspace(-1, 1, language.config.hidden_size)[None, None]
    logits = torch.tensor(_LOGITS)[None, None]
    decoder = _Instead(base, lambda: _Given(last_hidden_state=hidden))
    linear = _Instead(head, logits.clone)
    instead = {id(base): decoder, id(head): linear}
    shell = copy.copy(language)
    shell._modules = {name: instead.get(id(part), part) for name, part in language._modules.items()}
    found = type(language).forward(shell, input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
    if not isinstance(head, nn.Linear) or linear.given is None:
        return None
    before, after = linear.given.flatten()[0] / hidden.flatten()[0], (found / logits).flatten()
    softcap = found.abs().max() if after[-1] < after[0] / 2 else None
    expected = logits * after[0]
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    linear_too = torch.allclose(linear.given, hidden * before) and (before == 1 or head.bias is None)
    if not (linear_too and torch.allclose(found, expected, rtol=1e-5)):
        return None
    scale = (before * after[0]).item()
    return HeadSteps(None if abs(scale - 1) < 1e-6 else scale, None if softcap is None else softcap.item())


def _before_layers(model: nn.Module, **inputs: Tensor) -> list[Any]:
    """The arguments of the first layer of `model`; if no layer is called, the model's output."""
    lists = [part for part in _outermost(model) if len(part)]
    layers = max(lists, key=len, default=nn.ModuleList())
    inner = {id(parameter) for parameter in layers.parameters()}

    def stop(module, args, kwargs):
        raise _Reached(*args, *(kwargs[name] for name in sorted(kwargs)))

    handles = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in layers]
    try:
        with gathered([parameter for parameter in model.parameters() if id(parameter) not in inner]):
            return [model(**inputs, return_dict=True)[0]]
    except _Reached as reached:
        return [*reached.args]
    finally:
        for handle in handles:
            handle.remove()


def _outermost(module: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """The module lists that are not inside another list: the layers, but not their experts."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _same(one: Any, other: Any) -> bool:
    """Whether two values hold equal tensors in the same places."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, type(other)) and not isinstance(one, Tensor)
