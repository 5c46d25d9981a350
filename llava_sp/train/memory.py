"""What one forward and backward pass holds in memory, found by running it without numbers.

The model is built from its configuration with three decoder layers, as `FakeTensorMode` tensors, which have shapes and no
values. A step of it is run with the run's own layers (LoRA, autocast, checkpointing), and each allocation and release is
counted between marks: before the layers, each layer's forward, the head, each layer's backward, what comes after. The whole
depth follows by arithmetic, as the middle layer repeats. It takes seconds and no memory at any size. A language model whose layers differ
(`layer_types`) is run at full depth.

Not seen: what kernels allocate inside, the process's own memory (CUDA context, NCCL), and `offload`, whose activations count as if
they stayed.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM
from llava_sp.checkpoints.opening.backbones import zero3_set_aside
from llava_sp.config.arguments import ModelArguments
from llava_sp.train.build import add_lora
from llava_sp.train.stages import PARTS, STAGES, apply_stage, part_of

TRACED_LAYERS = 3  # the first, one that stands for all in the middle, the last


@dataclass(frozen=True)
class Batch:
    """The shape of a micro batch: `rows` of `tokens` (padding included), `images`, and `learned` positions in all rows.

    `masked`: rows differ in length, or hold several samples, so that attention gets a mask.
    """

    rows: int
    tokens: int
    images: int
    learned: int
    masked: bool = True


@dataclass(frozen=True)
class Setting:
    """What else the memory of a pass depends on. `kind` is that of the device, "cuda" or "cpu", whose attention kernels are assumed.

    `accumulated`: gradients of an earlier micro batch are there. `deepspeed`: one type for all weights, and gradients that
    leave for DeepSpeed's buffers as they are made.
    """

    stage: str
    bf16: bool = True
    deepspeed: bool = False
    accumulated: bool = False
    kind: str = "cuda"


@dataclass(frozen=True)
class Segment:
    """Bytes between two marks: what stays, the most beyond the start, and of what stays the gradients of parameters."""

    stays: int
    most: int
    gradients: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when a pass holds most, weights not counted; `gradients` and `logits` are parts of `total`."""

    total: int
    gradients: int
    logits: int


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while it is active; `known` ones are not counted."""

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.live = self.most = self.gradients = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.finalize(storage, self._released, key, size)
            self._seen[key].atexit = False
            self.live += size
            self.most = max(self.most, self.live)

    def _released(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size


class _Marks:
    """Cuts a pass into segments."""

    def __init__(self, allocations: Allocations):
        self.allocations = allocations
        self.segments: dict[str, Segment] = {}
        self._live = self._gradients = 0

    def end(self, name: str) -> None:
        a = self.allocations
        self.segments[name] = Segment(a.live - self._live, a.most - self._live, a.gradients - self._gradients)
        a.most = self._live = a.live
        self._gradients = a.gradients


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that a CUDA device takes, which tensors of a CPU would not."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    if attn_mask is None and query.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # each layer makes its own additive mask, which the backward pass needs
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, needs, 0.0, is_causal)[
        0
    ]


class StepTrace:
    """The segments of a pass with and without recomputation, and the parameters, of a model at full depth.

    Attributes:
        layers: decoder layers.
        counts: {part: parameters}, at full depth; trained: how many of them train; largest: in one tensor of these.
        setting: as given.
    """

    def __init__(self, config: LlavaSPConfig, arguments: ModelArguments, batch: Batch, setting: Setting):
        self.setting, self.layers = setting, config.text_config.num_hidden_layers
        shallow = _shallow(config)
        self._depth = shallow.text_config.num_hidden_layers
        self._segments: dict[bool, dict[str, Segment]] = {}
        for recompute in (False, True):
            model = _build(shallow, arguments, setting)
            self._count(model)
            self._segments[recompute] = _run(model, batch, setting, recompute, arguments.lora_dropout)

    def _count(self, model: LlavaSPForCausalLM) -> None:
        middle = {id(p) for p in decoder_layers(model)[min(1, self._depth - 1)].parameters()}
        repeated = 1 + self.layers - self._depth
        self.counts = dict.fromkeys(PARTS, 0)
        self.trained = self.largest = 0
        for name, parameter in model.named_parameters():
            times = repeated if id(parameter) in middle else 1
            self.counts[part_of(name)] += times * parameter.numel()
            if parameter.requires_grad:
                self.trained += times * parameter.numel()
                self.largest = max(self.largest, parameter.numel())
        # transformers counts the layers of tower and language model in one row
        self._offset = sum(isinstance(m, GradientCheckpointingLayer) for m in model.model.vision_tower.modules())

    def recomputed(self, every: int | None) -> list[bool]:
        """Which decoder layers `every_n_layers` recomputes; None: none."""
        return [bool(every) and (self._offset + layer) % (every or 1) == 0 for layer in range(self.layers)]

    def peak(self, every: int | None) -> Peak:
        """The most that a pass holds beyond weights and optimizer."""
        live = gradients = 0
        best = Peak(0, 0, 0)
        for name, segment in self._timeline(self.recomputed(every)):
            if live + segment.most > best.total:
                at_peak = gradients + (segment.gradients if segment.most == segment.stays else 0)
                best = Peak(live + segment.most, at_peak, segment.most if name == "head" else 0)
            live, gradients = live + segment.stays, gradients + segment.gradients
        return best

    def _timeline(self, recomputed: Sequence[bool]) -> Iterator[tuple[str, Segment]]:
        ends = self._segments[any(recomputed)]
        yield "before", ends["before"]
        for layer, again in enumerate(recomputed):
            yield "forward", self._segments[again][f"forward {self._twin(layer)}"]
        yield "head", ends["head"]
        for layer, again in reversed(list(enumerate(recomputed))):
            yield "backward", self._segments[again][f"backward {self._twin(layer)}"]
        yield "after", ends["after"]

    def _twin(self, layer: int) -> int:
        """The traced layer that stands for this one."""
        if layer == 0 or self._depth == self.layers:
            return layer
        return self._depth - 1 if layer == self.layers - 1 else 1


def decoder_layers(model: LlavaSPForCausalLM) -> nn.ModuleList:
    """The language model's layers. Raises `ValueError` if there is no list of them."""
    depth = model.config.text_config.num_hidden_layers
    for module in model.model.language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"no list of {depth} layers in {type(model.model.language_model).__name__}: its memory is not known"
    )


def _shallow(config: LlavaSPConfig) -> LlavaSPConfig:
    config = copy.deepcopy(config)
    text: Any = config.text_config
    kinds = getattr(text, "layer_types", None)
    if text.num_hidden_layers > TRACED_LAYERS and len(set(kinds or [None])) == 1:
        text.num_hidden_layers = TRACED_LAYERS
        if kinds:
            text.layer_types = kinds[:TRACED_LAYERS]
    return config


def _build(config: LlavaSPConfig, arguments: ModelArguments, setting: Setting) -> LlavaSPForCausalLM:
    """The model as a run builds it, without numbers."""
    if arguments.attn_implementation == "eager":
        config._attn_implementation = "eager"
    elif (getattr(config.text_config, "_attn_implementation", None) or "").startswith("fl"):  # flash, flex: as large as
        config._attn_implementation = "sdpa"
    with zero3_set_aside():
        with torch.device("meta"):
            model = LlavaSPForCausalLM(config)
        if "lora" in STAGES[setting.stage]:
            add_lora(model, arguments)
    apply_stage(model, setting.stage)
    return model


def _make_fake(model: nn.Module, setting: Setting) -> None:
    """Inside FakeTensorMode: tensors of the types that training has in the place of those on the meta device."""
    low = torch.bfloat16 if setting.bf16 else torch.float32
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                dtype = torch.float32 if old.requires_grad and not setting.deepspeed else low
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
            if old is not None:
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _run(
    model: LlavaSPForCausalLM, batch: Batch, setting: Setting, recompute: bool, dropout: float
) -> dict[str, Segment]:
    with FakeTensorMode():
        _make_fake(model, setting)
        model.train()
        model.model.vision_tower.eval()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if setting.accumulated:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
        allocations = Allocations(known)
        marks = _Marks(allocations)
        _hook(model, marks)
        for parameter in trained:
            if setting.deepspeed:
                parameter.register_post_accumulate_grad_hook(_leave)
            elif not setting.accumulated:
                parameter.register_post_accumulate_grad_hook(_counting(allocations))
        # as `build.autocast_casts_back`
        without_casts = setting.bf16 and not setting.deepspeed and (dropout == 0 or setting.kind == "cuda")
        with allocations, _kernels(batch, setting), disable_input_dtype_casting(model, without_casts):
            _loss(model, batch, setting).backward()
        marks.end("after")
    return marks.segments


def _leave(parameter: Tensor) -> None:
    parameter.grad = None


def _counting(allocations: Allocations) -> Any:
    def count(parameter: Tensor) -> None:
        allocations.gradients += parameter.nbytes

    return count


def _hook(model: LlavaSPForCausalLM, marks: _Marks) -> None:
    """Marks at the layers' borders; a border is passed backwards when the gradient there is complete."""
    layers = decoder_layers(model)
    last = len(layers) - 1

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        marks.end("before")
        if hidden.requires_grad:
            hidden.register_hook(lambda _: marks.end("backward 0"))

    def after(layer: int) -> Any:
        def mark(_module: nn.Module, _args: tuple, output: Any) -> None:
            marks.end(f"forward {layer}")
            hidden = output[0] if isinstance(output, tuple) else output
            name = "head" if layer == last else f"backward {layer + 1}"
            hidden.register_hook(lambda _: marks.end(name))

        return mark

    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(after(index))


def _loss(model: LlavaSPForCausalLM, batch: Batch, setting: Setting) -> Tensor:
    """`LlavaSPForCausalLM.forward`, without the steps that need values."""
    config, core = model.config, model.model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.bf16 and not setting.deepspeed):
        ids = torch.empty(batch.rows, batch.tokens, dtype=torch.long)
        labels = torch.empty_like(ids)
        side = config.image_size
        embeds = core.get_input_embeddings()(ids)
        pixels = torch.empty(max(batch.images, 1), getattr(config.vision_config, "num_channels", 3), side, side)
        tokens: Any = torch.stack(list(core.get_image_features(pixels).pooler_output))
        placeholders = (ids == config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(placeholders, tokens.to(embeds.dtype))
        mask = torch.ones_like(ids) if batch.masked else None
        hidden = core.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        learned = torch.empty(batch.learned, dtype=torch.long)
        logits = model.silence(model.logits_of(hidden[:, :-1].flatten(0, 1)[learned]).float())
        loss = F.cross_entropy(logits, labels.flatten()[learned], reduction="sum") / batch.learned
    return loss


@contextlib.contextmanager
def _kernels(batch: Batch, setting: Setting) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if setting.kind == "cuda":
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _cuda_attention))
        if not batch.masked:  # without values, transformers takes every row for a pack, and makes a mask
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None))
        yield
