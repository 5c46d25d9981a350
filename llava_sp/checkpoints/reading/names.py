"""Names of tensors: the original's and transformers' LLaVA's keys against our parameter names, in one table read both ways.

What the original's configuration does not record, such as the variant, follows from these names and the shapes.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from llava_sp.checkpoints.reading.tensor_files import StoredTensor

PROJECTOR = "model.multi_modal_projector."
LANGUAGE = "model.language_model."
TOWER = "model.vision_tower."
HEAD = "lm_head."
LORA = ".lora_"
ADAPTER_NAME = "default"
PEFT = "base_model.model."  # PEFT's files name parameters as seen from its wrapper
CONSTANTS = ("rotary_emb.inv_freq", "position_ids", "num_batches_tracked")  # not weights; most in older files
ORIGINAL_SCALES = (4, 8, 12, 16, 20, 24)
ORIGINAL_GRID = 24

_INTEGRATOR = ("query", "key", "value")
_EXTRACTOR = "spatial.extractor.projections."
_POOLED = "conv_{scale}.1.weight"  # after its pooling, except for the scale of the whole grid, without pooling
# The original's key without wrappers, and our name within the projector.
_PROJECTOR = (
    ("mm_projector.0.{leaf}", "linear_1.{leaf}"),
    ("mm_projector.2.{leaf}", "linear_2.{leaf}"),
    ("conv_{scale}.weight", f"{_EXTRACTOR}{{scale}}.weight"),
    (_POOLED, f"{_EXTRACTOR}{{scale}}.weight"),
    ("conv_linear.1.{leaf}", "spatial.linear.{leaf}"),
    ("conv_CM.weight", "spatial.integrator.context.weight"),
    *((f"{part}_projector.{{rest}}", f"spatial.integrator.{part}.{{rest}}") for part in _INTEGRATOR),
)
_FIELDS = {"leaf": "weight|bias", "scale": r"\d+", "rest": ".+"}
# The same for the other parts, by the prefix of the names.
_PARTS = (
    ("vision_tower.vision_tower.", TOWER),
    ("vision_tower.", TOWER),
    ("layers.", f"{LANGUAGE}layers."),
    ("embed_tokens.", f"{LANGUAGE}embed_tokens."),
    ("norm.", f"{LANGUAGE}norm."),
)
# transformers' LLaVA has the language model in two namings: in files, and in memory.
_LLAVA_HF = (
    ("language_model.lm_head.", HEAD),
    ("lm_head.", HEAD),
    ("language_model.model.", LANGUAGE),
    ("language_model.", LANGUAGE),
    ("vision_tower.", TOWER),
    ("multi_modal_projector.", PROJECTOR),
)


def unwrapped(key: str) -> str:
    """A key without the wrappers it was saved through: `base_model.model.model.conv_4.weight` -> `conv_4.weight`."""
    return re.sub(r"^((base_model|model|module)\.)+", "", key)


def tower_name(name: str) -> str:
    """A parameter's name as `Checkpoint.tensors` has it: transformers before 5.20 has one level more in the tower."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def our_projector_name(key: str) -> str | None:
    """The original's key, without wrappers -> the name within our projector; None if it is not of the projector."""
    matches = ((_template(theirs).fullmatch(key), ours) for theirs, ours in _PROJECTOR)
    return next((ours.format(**match.groupdict()) for match, ours in matches if match), None)


def original_projector_name(name: str, variant: str, grid: int = ORIGINAL_GRID) -> str:
    """The inverse of `our_projector_name`; the variant decides the index of a convolution in its sequence."""
    for theirs, ours in _PROJECTOR:
        match = _template(ours).fullmatch(name)
        if match is not None:
            scale = match.groupdict().get("scale")
            pooled = variant == "pooling" and scale not in (None, str(grid))
            if pooled == (theirs == _POOLED):
                return theirs.format(**match.groupdict())
    return name


def our_name(key: str) -> str | None:
    """The original's key, wrapped or not -> the name in our model; None if it does not exist there."""
    key = unwrapped(key)
    projector = our_projector_name(key)
    if projector is not None:
        return PROJECTOR + projector
    return key if key.startswith(HEAD) else _replaced(tower_name(key), _PARTS)


def original_name(name: str, variant: str, grid: int = ORIGINAL_GRID) -> str:
    """Our name -> the key in a full model of the original's; LoRA's keys have `PEFT` before it."""
    if name.startswith(PROJECTOR):
        return f"model.{original_projector_name(name.removeprefix(PROJECTOR), variant, grid)}"
    if name.startswith(TOWER):
        return tower_name(name).replace(TOWER, "model.vision_tower.vision_tower.vision_model.")
    return name.replace(LANGUAGE, "model.")


def llava_hf_name(key: str) -> str | None:
    """A key of transformers' LLaVA -> the name in our model; None if it does not exist there."""
    return _replaced(tower_name(key.removeprefix("model.")), _LLAVA_HF)


def adapter_of(name: str) -> str | None:
    """The name of the adapter that a model's parameter belongs to; None if it is not LoRA's."""
    return name.rpartition(LORA)[2].split(".")[1] if LORA in name else None


def without_adapter_name(name: str) -> str:
    """LoRA's parameter name in a model -> in a checkpoint."""
    layer, lora, rest = name.rpartition(LORA)
    matrix, _, leaf = rest.partition(".")
    return ".".join([layer + lora + matrix, *leaf.split(".")[1:]])  # an embedding's has no leaf


def with_adapter_name(name: str) -> str:
    """A tensor's name in a checkpoint -> in a model, where LoRA's have the adapter's name."""
    layer, lora, rest = name.rpartition(LORA)
    matrix, dot, leaf = rest.partition(".")  # of an embedding, without leaf
    return f"{layer}{lora}{matrix}.{ADAPTER_NAME}{dot}{leaf}" if lora else name


def spatial_layout(projector: dict[str, StoredTensor]) -> tuple[dict[str, Any], list[str]]:
    """`(keywords of LlavaSPConfig, names that this layout needs and that are missing)`, from an original's projector.

    Raises:
        ValueError: some convolutions are of one variant, some of the other.
    """
    shapes = {name.removeprefix(PROJECTOR): tensor.shape for name, tensor in projector.items()}
    needed = [f"linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]
    settings: dict[str, Any] = {"spatial_variant": "none"}
    if any(name.startswith("spatial.") for name in shapes):
        scales = sorted(int(name.split(".")[3]) for name in shapes if name.startswith(_EXTRACTOR))
        wanted = ORIGINAL_SCALES if set(scales) < set(ORIGINAL_SCALES) else tuple(scales)
        pooled = _is_pooled(projector)
        fusion = any(name.startswith("spatial.integrator.") for name in shapes)
        settings = {
            "spatial_variant": "pooling" if pooled else "cropping",
            "spatial_fusion": fusion,
            "spatial_projection_bias": not pooled or "spatial.linear.bias" in shapes,
            "spatial_scales": list(wanted),
        }
        if scales:
            settings["spatial_width"] = shapes[f"{_EXTRACTOR}{scales[0]}.weight"][0]
        if "spatial.integrator.context.weight" in shapes:
            settings["fusion_kernel"] = shapes["spatial.integrator.context.weight"][2]
        needed += [f"{_EXTRACTOR}{scale}.weight" for scale in wanted] + ["spatial.linear.weight"]
        needed += [] if pooled else ["spatial.linear.bias"]
        if fusion:
            leaves = [f"{layer}.{leaf}" for layer in (0, 1) for leaf in ("weight", "bias")]
            needed.append("spatial.integrator.context.weight")
            needed += [f"spatial.integrator.{part}.{leaf}" for part in _INTEGRATOR for leaf in leaves]
    return settings, [PROJECTOR + name for name in needed if name not in shapes]


def _is_pooled(projector: dict[str, StoredTensor]) -> bool:
    found: dict[bool, StoredTensor] = {}
    for tensor in projector.values():
        match = re.fullmatch(r"conv_(\d+)(\.1)?\.weight", unwrapped(tensor.key))
        if match is not None and match.group(1) != str(ORIGINAL_GRID):
            found[match.group(2) is not None] = tensor
    if len(found) > 1:
        raise ValueError(
            f"{found[True].file} holds {found[True].key}, of the pooling variant, and {found[False].file} holds "
            f"{found[False].key}, of the cropping variant: two checkpoints were mixed"
        )
    return True in found


def _replaced(key: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((ours + key.removeprefix(theirs) for theirs, ours in table if key.startswith(theirs)), None)


@cache
def _template(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", text)  # literal text and fields in alternation
    return re.compile("".join(f"(?P<{p}>{_FIELDS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))
