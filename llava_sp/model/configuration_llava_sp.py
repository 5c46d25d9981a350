"""The configuration of a LLaVA-SP model: all that changes parameters or tokens, saved as config.json with the weights.

Token counts, the patch grid and the scales are derived here and nowhere else.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import LlavaConfig, PreTrainedConfig


class LlavaSPConfig(LlavaConfig):
    r"""LLaVA-1.5's configuration plus the spatial branch of LLaVA-SP (Lou et al., ICCV 2025, arXiv 2507.00505).

    Args:
        spatial_variant: `"cropping"` (from the central region to the whole grid), `"pooling"` (from abstract to
            specific), any other key of `projector.SPATIAL_VARIANTS`, or `"none"`, which is LLaVA-1.5.
        spatial_scales: window side in patches of each spatial token, in the order of the tokens. `None` means six
            evenly spaced ones up to the whole grid (4, 8, ..., 24 on the paper's 24 x 24 grid).
        spatial_width: width of the extractor's vectors (512 in the paper); `None` is half the vision width.
        spatial_fusion: whether the detail feature integrator (the paper's cross-attention) is used.
        spatial_projection_bias: bias of the spatial tokens' linear layer; `None` follows the released weights: only
            cropping has one.
        fusion_kernel, fusion_stride: windows of the grid that the integrator attends to (16 and 2 in the paper);
            `None` is two thirds of the grid, and a stride that leaves about five positions a side.
        pad_token_id: the id that fills rows of unequal length; `None` is that of `text_config`, which may be `None` too.
        language_model_name_or_path, vision_tower_name_or_path: where the frozen weights came from (hub id or path), with
            the content hash of their weight files. An adapter checkpoint is opened on these.
        vision_tower_leading_tokens: tokens of the tower before its patches (class token, registers); `None` is
            one where `vision_feature_select_strategy` is `"default"`, else none.
        language_model_head_bias: whether the language model's head has a bias.
        language_model_logit_scale, language_model_logit_softcap: what the language model does to its head's logits,
            `softcap * tanh(scale * logits / softcap)`; `None` skips a step.

    Raises:
        ValueError: an image or patch size that is not square, a layer that the tower lacks, a scale outside
            `1 .. grid_size`, or fusion windows that do not fit in the grid.
    """

    model_type = "llava_sp"
    if TYPE_CHECKING:  # what LlavaConfig makes of a dictionary or None
        text_config: PreTrainedConfig
        vision_config: PreTrainedConfig

    spatial_variant: str = "cropping"
    spatial_scales: list[int] | None = None
    spatial_width: int | None = None
    spatial_fusion: bool = True
    spatial_projection_bias: bool | None = None
    fusion_kernel: int | None = None
    fusion_stride: int | None = None
    pad_token_id: int | None = None
    language_model_name_or_path: str | None = None
    language_model_fingerprint: str | None = None
    vision_tower_name_or_path: str | None = None
    vision_tower_fingerprint: str | None = None
    vision_tower_leading_tokens: int | None = None
    language_model_head_bias: bool = False
    language_model_logit_scale: float | None = None
    language_model_logit_softcap: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pad_token_id is None:
            self.pad_token_id = getattr(self.text_config, "pad_token_id", None)
        if self.spatial_variant != "none":
            grid = self.grid_size
            if self.spatial_scales is None:
                evenly = [max(1, round(grid * step / 6)) for step in range(1, 7)]
                self.spatial_scales = list(dict.fromkeys(evenly))  # below a side of 6, fewer than six differ
            if self.spatial_width is None:
                self.spatial_width = self.vision_width // 2
            if self.spatial_projection_bias is None:
                self.spatial_projection_bias = self.spatial_variant == "cropping"
            if self.fusion_kernel is None:
                self.fusion_kernel = max(1, round(grid * 2 / 3))
            if self.fusion_stride is None:
                self.fusion_stride = max(1, (grid - self.fusion_kernel) // 4)
        for key, fits, right in self._limits():
            if not fits:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be {right}")
        self.image_seq_length = self.num_image_tokens

    def _limits(self) -> Iterator[tuple[str, bool, str]]:
        """(key, whether its value is valid, the valid values)"""
        layers, depth = self.vision_feature_layer, getattr(self.vision_config, "num_hidden_layers", None)
        if depth:  # timm's towers do not record it
            fits = all(-depth - 1 <= layer <= depth for layer in ([layers] if isinstance(layers, int) else layers))
            yield "vision_feature_layer", fits, f"{-depth - 1} to {depth}: embeddings and {depth} layers"
        yield "vision_tower_leading_tokens", self.num_leading_tokens >= 0, "a number of tokens"
        for step in ("language_model_logit_scale", "language_model_logit_softcap"):
            value = getattr(self, step)
            yield step, value is None or 0 < value < float("inf"), "a number above 0, or null"
        if self.spatial_variant == "none":
            return
        grid, scales = self.grid_size, self.spatial_scales or []
        in_grid = f"from 1 to {grid}, the side of the patch grid"
        distinct = len(scales) == len(set(scales)) > 0 and all(1 <= scale <= grid for scale in scales)
        yield (
            "spatial_scales",
            distinct,
            f'different numbers {in_grid}; for no spatial tokens use spatial_variant="none"',
        )
        yield "spatial_width", (self.spatial_width or 0) >= 1, "at least 1"
        if self.spatial_fusion:
            yield "fusion_kernel", 1 <= (self.fusion_kernel or 0) <= grid, in_grid
            yield "fusion_stride", (self.fusion_stride or 0) >= 1, "at least 1"

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return _square_side(getattr(self.vision_config, "image_size", None), "image_size")

    @property
    def grid_size(self) -> int:
        """G: patches along one side of the image."""
        patch = _square_side(getattr(self.vision_config, "patch_size", None), "patch_size")
        return self.image_size // patch

    @property
    def vision_width(self) -> int:
        """C: width of the patch features (several vision layers are concatenated)."""
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.vision_config.hidden_size * layers

    @property
    def num_leading_tokens(self) -> int:
        """Tokens of the tower's features before the patches."""
        default = int(self.vision_feature_select_strategy == "default")
        return default if self.vision_tower_leading_tokens is None else self.vision_tower_leading_tokens

    @property
    def num_patch_tokens(self) -> int:
        """N = G * G."""
        return self.grid_size**2

    @property
    def num_spatial_tokens(self) -> int:
        """S: one token per scale."""
        return 0 if self.spatial_variant == "none" else len(self.spatial_scales or [])

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image: S spatial tokens, then N patch tokens."""
        return self.num_spatial_tokens + self.num_patch_tokens


def _square_side(size: object, name: str) -> int:
    """The side of a square given as one number or as two equal ones."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ValueError(f"the vision tower's {name} is {size!r}; it must be the side of a square, in pixels")
    return sides[0]


LlavaSPConfig.register_for_auto_class()

# Settable fields of a new model, by name: the projector's settings, and the tower's layer(s) that it reads.
# The other fields follow from the two backbones.
PROJECTOR_SETTINGS = {
    f.name: f
    for f in dataclasses.fields(LlavaSPConfig)
    if f.name == "vision_feature_layer"
    or (f.name in LlavaSPConfig.__annotations__ and not f.name.startswith(("pad_", "language_model_", "vision_tower_")))
}

__all__ = ["LlavaSPConfig"]
