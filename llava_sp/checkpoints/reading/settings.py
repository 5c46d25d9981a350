"""Schema of the JSON files beside weights: the settings that affect computation, with their ranges.

transformers and PEFT check the types of all other settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_sp.common.files import read_json
from llava_sp.common.schema import NOT_NEGATIVE, NUMBER, POSITIVE, Check, Spec, expect, one_of

COUNT = Check(lambda value: 1 <= value < 2**31, "a whole number from 1 on", int)
UNIT = Check(lambda value: 0 <= value <= 1, "a number from 0 to 1", float)
_LAYERS = Check(lambda value: 1 <= value <= 1000, "a whole number from 1 to 1000", int)
_DTYPE = Check(
    lambda name: isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype) or name in ("", "auto"),
    "float16 or the like",
    str,
)
_SIZE = (COUNT, [COUNT], None)
_PIXELS = Check(lambda value: 1 <= value <= 2**14, "1 to 16384 pixels", int)
_SIDES = (_PIXELS, [_PIXELS], {str: (_PIXELS, None)}, None)


def _each(names: str, spec: Spec) -> dict[str, Spec]:
    """Optional keys, separated by spaces."""
    return {f"{name}?": spec for name in names.split()}


# Of a language model or a tower of any kind.
_BACKBONE = {
    **_each("num_hidden_layers", (_LAYERS, None)),
    **_each("hidden_size intermediate_size head_dim num_attention_heads num_key_value_heads num_channels", _SIZE),
    **_each("vocab_size", COUNT),
    **_each("dtype torch_dtype", (_DTYPE, None)),
    **_each("image_size patch_size", _SIDES),
    **_each("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps rope_theta", (POSITIVE, None)),
    **_each("rope_parameters rope_scaling", (_each("rope_theta factor", (POSITIVE, None)), None)),
    **_each("attention_dropout hidden_dropout dropout", (UNIT, None)),
}
# config.json of a backbone, or of a model with both.
_CONFIG = _BACKBONE | _each("text_config vision_config", (_BACKBONE, None))
_GENERATION = {
    **_each("max_new_tokens max_length num_beams num_return_sequences", (COUNT, None)),
    **_each("temperature top_k min_length min_new_tokens no_repeat_ngram_size", (NOT_NEGATIVE, None)),
    **_each("top_p min_p typical_p", (UNIT, None)),
    **_each("repetition_penalty max_time", (POSITIVE, None)),
    **_each("length_penalty guidance_scale", (NUMBER, None)),
    **_each("do_sample use_cache", (bool, None)),
}
_IMAGES = {
    **_each("image_mean", ([Check(lambda value: -1 <= value <= 255, "a pixel value", float)], None)),
    **_each("image_std", ([Check(lambda value: 0 < value <= 255, "a pixel value above 0", float)], None)),
    **_each("rescale_factor", (POSITIVE, None)),
    **_each("size crop_size", _SIDES),
    **_each("resample", (one_of(*range(6)), None)),
    **_each("do_resize do_rescale do_normalize do_center_crop do_convert_rgb", (bool, None)),
}
_TOKENIZER = _each("model_max_length", (POSITIVE, None)) | _each("add_prefix_space", (bool, None))
# Of this package's formats; for required settings, see `opening.full.recorded_config`.
_OUR_CONFIG = _CONFIG | {
    "model_type?": one_of("llava_sp"),
    **_each("spatial_scales", ([COUNT], None)),
    **_each("spatial_width fusion_kernel fusion_stride", (COUNT, None)),
    **_each("spatial_fusion spatial_projection_bias multimodal_projector_bias", (bool, None)),
    **_each("vision_feature_layer", (int, [int])),
    **_each("vision_feature_select_strategy", one_of("default", "full")),
    **_each("language_model_name_or_path vision_tower_name_or_path", (str, None)),
    **_each("language_model_fingerprint vision_tower_fingerprint", (str, None)),
}
_STATED = "do_resize size resample do_rescale rescale_factor do_normalize image_mean image_std"
_OUR_IMAGES = _IMAGES | dict.fromkeys(_STATED.split(), Any)
_OUR_PROCESSOR = {
    "num_image_tokens": COUNT,
    "image_aspect_ratio": str,
    "conversation_template": str,
    "image_processor?": _OUR_IMAGES,
}


def read_all_settings(folder: Path, kind: str = "backbone") -> dict[str, Any]:
    """The JSON files of a model's folder by name, {} for a missing one; settings are checked against their ranges.

    Args:
        kind: "ours", a third-party "model", whose generation settings are checked, or a "backbone", of which only
            the end-of-sequence ids are.

    Raises:
        ValueError: with file, key, value, and what is expected.
    """
    file = folder / "config.json"
    config = _read(file, _OUR_CONFIG if kind == "ours" else _CONFIG)
    text = config.get("text_config") or config
    rows = text.get("vocab_size") or 2**31
    token = Check(lambda value: 0 <= value < rows, f"a token's id, below {rows}", int)
    padding = Check(lambda value: -1 <= value < rows, f"a token's id, below {rows}, or -1", int)
    expect(text, _each("pad_token_id", (padding, None)), file)
    ends = _each("eos_token_id", (token, [token], None))
    if kind != "backbone":
        ends |= _GENERATION | _each("bos_token_id pad_token_id image_token_index", (token, None))
        expect(config, ends, file)
    specs = {
        "generation_config.json": ends,
        "preprocessor_config.json": _IMAGES,
        "processor_config.json": _OUR_PROCESSOR if kind == "ours" else dict,
        "tokenizer_config.json": _TOKENIZER,
    }
    return {file.name: config} | {name: _read(folder / name, spec) for name, spec in specs.items()}


def _read(file: Path, spec: Spec) -> Any:
    return read_json(file, spec) if file.is_file() else {}
