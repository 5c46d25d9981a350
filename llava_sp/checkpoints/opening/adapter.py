"""Adapter checkpoints: LoRA and projector, without base weights or embeddings, in a folder with a manifest.

    config.json                 LlavaSPConfig, with the base models and the fingerprints of their weights
    projector.safetensors       patch MLP and spatial branch; its presence makes the folder an adapter checkpoint
    lora/adapter_config.json    PEFT's own format; absent after the first stage
    lora/adapter_model.safetensors
    generation_config.json and the processor's files
    llava_sp.json               format, contents, sizes and hashes; written last, so an interrupted save has none

Every file is written beside its target and renamed, so no file is ever partial.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from llava_sp.checkpoints.opening.backbones import Backbones
from llava_sp.checkpoints.opening.fill import fill, freeze, gathered
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.opening.foreign import bases_of
from llava_sp.checkpoints.opening.full import config_differences, recorded_config
from llava_sp.checkpoints.reading.formats import LORA_FOLDER, LORA_TENSORS, Checkpoint, recognise
from llava_sp.checkpoints.reading.lora_settings import our_settings
from llava_sp.checkpoints.reading.manifest import MANIFEST
from llava_sp.checkpoints.reading.names import ADAPTER_NAME, LORA, PEFT, PROJECTOR, adapter_of, without_adapter_name
from llava_sp.checkpoints.reading.places import base_kwargs, hub_kwargs
from llava_sp.checkpoints.reading.tensor_files import value_problem
from llava_sp.common.files import identity, replacing, write_json
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import ADAPTER_FILE

FORMAT = 1
T = TypeVar("T", bound=Tensor)


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """LoRA (of several, the active one) and projector as whole tensors on the CPU, under the model's own parameter names.

    Under ZeRO-3 every process must call this; each parameter is gathered in turn.
    """
    state = {}
    for name, parameter in _saved(model, dict(model.named_parameters())).items():
        with gathered([parameter]):
            state[name] = parameter.detach().cpu().clone().contiguous()
    return state


def _saved(model: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """What an adapter checkpoint holds of a model's tensors: LoRA (of several, the active one) and the projector."""
    active = _active_adapter(model)
    return {n: tensor for n, tensor in state.items() if n.startswith(PROJECTOR) or adapter_of(n) == active}


def _active_adapter(model: Any) -> str:
    """The name of the active LoRA. Raises `ValueError` for several, which an adapter checkpoint cannot hold."""
    active = model.active_adapters() if getattr(model, "_hf_peft_config_loaded", False) else [ADAPTER_NAME]
    if len(active) != 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active; save one after the other: model.set_adapter(NAME)"
        )
    return active[0]


def save_adapter(
    model,
    processor,
    path: str | os.PathLike,
    *,
    run: dict | None = None,
    state_dict: dict[str, Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write LoRA and projector, their configuration and (if given) the processor to `path`.

    Args:
        run: the manifest's record of the run that made the weights (stage, step, ...).
        state_dict: as from `trainable_state_dict`, or the whole model's; by default taken from the model now.
        write: false on processes that only take part in gathering (all but the main one).

    Raises:
        ValueError: a tensor is empty or not finite, or has values that opening rejects, or the adapter is of a
            kind that could not be opened; nothing is written then.
        OSError: the disk is full or `path` cannot be written; a previous checkpoint there is invalid
            only if some of its files were replaced already, and then has no manifest.
    """
    state = trainable_state_dict(model) if state_dict is None else _saved(model, state_dict)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    broken = [
        f"{name} {found}" for name, tensor in state.items() if (found := value_problem(tensor, zeros_allowed=True))
    ]
    if broken or not state:  # on every process, so that none blocks in a collective
        such = f"{broken[0]}{f' (and {len(broken) - 1} more)' * (len(broken) > 1)}" if state else "no projector"
        raise ValueError(f"{path} is not saved: {such}")
    if not write:
        return
    path, adapter = Path(path), _active_adapter(model)
    projector = {name.removeprefix(PROJECTOR): t for name, t in state.items() if name.startswith(PROJECTOR)}
    lora = {PEFT + without_adapter_name(name): tensor for name, tensor in state.items() if LORA in name}
    settings = (
        _lora_settings(model, adapter, path / LORA_FOLDER) if adapter in getattr(model, "peft_config", {}) else None
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)

    with replacing(path / ADAPTER_FILE) as file:
        save_file(projector, file, metadata={"format": "pt"})
    shutil.rmtree(path / LORA_FOLDER, ignore_errors=True)  # from another model saved here
    if lora:
        _write_lora(settings, lora, path / LORA_FOLDER)
    model.save_code(path)
    _save_config(model, path)
    if processor is not None:
        processor.save_pretrained(path)

    manifest = {
        "format": FORMAT,
        "contents": {"projector": len(projector), "lora": len(lora)},
        "parameters": {"projector": _count(projector), "lora": _count(lora)},
        "language_model": [model.config.language_model_name_or_path, model.config.language_model_fingerprint],
        "vision_tower": [model.config.vision_tower_name_or_path, model.config.vision_tower_fingerprint],
        "files": {str(file.relative_to(path)): identity(file) for file in _tensor_files(path)},
        "run": run or {},
    }
    write_json(path / MANIFEST, manifest)


def open_adapter(
    cls,
    found: Checkpoint,
    *,
    config: LlavaSPConfig | None = None,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    check_base: bool = True,
    is_trainable: bool = False,
    dtype: torch.dtype | str = "auto",
    **load_kwargs,
):
    """Open an adapter checkpoint on its base models.

    Args:
        config: instead of the recorded one, with which it must agree.
        language_model, vision_tower: instead of the recorded ones, for instance on another machine.
        check_base: compare the base weights' fingerprints with the recorded ones.
        is_trainable: leaves LoRA and projector trainable, in float32; by default nothing trains.

    Raises:
        ValueError: a base model is not at its recorded path, its weights are not those that the adapter was trained
            on, or tensors do not fit. The message names what is expected.
    """
    load_kwargs = base_kwargs(load_kwargs)
    config = recorded_config(found, config)
    check_fits(found, config)
    bases = bases_of(found, language_model, vision_tower, **hub_kwargs(load_kwargs))
    dtype = config.dtype or "auto" if dtype == "auto" else dtype
    model = Backbones.find(*bases, **load_kwargs).load(cls, config, dtype, recorded=True, **load_kwargs)
    if check_base:
        check_bases(found, config)
    if found.lora is not None:
        model.add_adapter(found.lora_config(), adapter_name=ADAPTER_NAME)
    fill(freeze(model, is_trainable), found)
    if (found.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    return model


def load_adapter(model: Any, path: str | os.PathLike) -> None:
    """Load LoRA and projector of a checkpoint into a model that has the same parts.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; nothing is loaded then.
    """
    found = recognise(path)
    fill(model, found, differences=config_differences(found, model.config))


def load_projector(model: Any, path: str | os.PathLike, *, check_base: bool = True) -> None:
    """Load a first stage's whole projector (patch MLP and spatial branch) into a model.

    With `check_base`, the bases must be those that it was trained on.

    Raises:
        ValueError: the projector is of another variant, width or grid (the message lists the differing settings and
            tensors), or was trained on other bases or layers; or the save was interrupted.
    """
    found = recognise(path)
    if check_base:
        check_bases(found, model.config)
    fill(model, found, (PROJECTOR,), config_differences(found, model.config))


def check_bases(found: Checkpoint, config: LlavaSPConfig) -> None:
    """Raises `ValueError` if the recorded fingerprints of the bases, or the layers of the tower, differ."""
    problem = next(_base_differences(found, config), None)
    if problem:
        raise ValueError(f"{found.folder} was trained {problem}, or check_base=False to use these")


def _base_differences(found: Checkpoint, config: LlavaSPConfig) -> Iterator[str]:
    for keyword in ("language_model", "vision_tower"):
        was, now = found.config.get(f"{keyword}_fingerprint"), getattr(config, f"{keyword}_fingerprint")
        if was not in (None, now):
            place = getattr(config, f"{keyword}_name_or_path")
            yield (
                f"on a {keyword.replace('_', ' ')} with the fingerprint {was}, but {place} has {now}: the weights "
                f"differ. Pass {keyword}=<the right one>"
            )
    layers, own = found.feature_layer, config.vision_feature_layer
    if _feature_layers(layers, config) != _feature_layers(own, config):
        yield f"with vision_feature_layer = {layers}, but it is {own} here: the features differ. Pass {layers}"


def _feature_layers(layers: Any, config: LlavaSPConfig) -> list[int]:
    """Counted from the first: of 24 layers, -2 is 23."""
    states = getattr(config.vision_config, "num_hidden_layers", None)
    each = [layers] if isinstance(layers, int) else layers
    return [layer % (states + 1) if isinstance(states, int) else layer for layer in each]


def _save_config(model, path: Path) -> None:
    with replacing(path / "config.json") as file:
        model.config.architectures = [type(model).__name__]
        file.write_text(model.config.to_json_string())
    with replacing(path / "generation_config.json") as file:
        model.generation_config.to_json_file(file)


def _lora_settings(model, adapter: str, folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises `ValueError` for a kind of adapter that could not be opened."""
    settings = model.peft_config[adapter].to_dict()
    settings["base_model_name_or_path"] = model.config.language_model_name_or_path
    settings["inference_mode"] = True
    settings = json.loads(json.dumps(settings, default=_json_default, sort_keys=True))
    return our_settings(settings, folder / "adapter_config.json")


def _write_lora(settings: dict[str, Any] | None, lora: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as file:
        save_file(lora, file, metadata={"format": "pt"})
    with replacing(folder / "adapter_config.json") as file:
        file.write_text(json.dumps(settings, indent=2))


def _json_default(value):
    if isinstance(value, set):
        return sorted(value)
    return str(value)


def _tensor_files(path: Path) -> list[Path]:
    return [path / name for name in (ADAPTER_FILE, LORA_TENSORS) if (path / name).is_file()]


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
