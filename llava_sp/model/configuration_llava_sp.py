"""What a LLaVA-SP model is: everything that changes parameters or tokens, saved as config.json beside the weights.

Token counts, the patch grid and the scales are derived here, once; nothing else in the project spells them out.
"""

from transformers import LlavaConfig


class LlavaSPConfig(LlavaConfig):
    r"""LLaVA-1.5's configuration plus the spatial branch of LLaVA-SP (Lou et al., ICCV 2025, arXiv 2507.00505).

    Args:
        spatial_variant: `"cropping"` (from the central region to the whole grid), `"pooling"` (from abstract to
            specific), any other key of `projector.SPATIAL_VARIANTS`, or `"none"`, which is LLaVA-1.5.
        spatial_scales: window side in patches of each spatial token, in the order of the tokens. `None` means six
            evenly spaced ones up to the whole grid (4, 8, ..., 24 on the paper's 24 x 24 grid).
        spatial_width: width of the extractor's vectors (512 in the paper); `None` is half the vision width.
        spatial_fusion: whether the detail feature integrator (the paper's cross-attention) is on.
        spatial_projection_bias: bias of the spatial tokens' linear layer; `None` follows the released weights: only
            cropping has one.
        fusion_kernel, fusion_stride: windows of the grid that the integrator attends to (16 and 2 in the paper);
            `None` is two thirds of the grid, and a stride that leaves about five positions a side.
        language_model_name_or_path, vision_tower_name_or_path: where the frozen weights came from (hub id or path), with the content
            hash of their weight files. An adapter checkpoint is opened on these.

    Raises:
        ValueError: an image or patch size that is not square, a layer that the tower has not, a scale outside
            `1 .. grid_size`, or fusion windows that do not fit in the grid.
    """

    model_type = "llava_sp"

    spatial_variant: str = "cropping"
    spatial_scales: list[int] | None = None
    spatial_width: int | None = None
    spatial_fusion: bool = True
    spatial_projection_bias: bool | None = None
    fusion_kernel: int | None = None
    fusion_stride: int | None = None
    language_model_name_or_path: str | None = None
    language_model_fingerprint: str | None = None
    vision_tower_name_or_path: str | None = None
    vision_tower_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_layers()
        grid = self.grid_size
        if self.spatial_variant != "none":
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
            self._check_spatial(grid)
        self.image_seq_length = self.num_image_tokens

    def _check_layers(self) -> None:
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if not depth:  # timm's towers do not say
            return
        layers = self.vision_feature_layer
        for layer in [layers] if isinstance(layers, int) else layers:
            if not -depth - 1 <= layer <= depth:  # the embeddings come first
                raise ValueError(
                    f"vision_feature_layer is {layer}, but the vision tower has {depth} layers: use {-depth - 1} to {depth}"
                )

    def _check_spatial(self, grid: int) -> None:
        if not self.spatial_scales:
            raise ValueError('spatial_scales is empty; for a model without spatial tokens use spatial_variant="none"')
        for scale in self.spatial_scales:
            if not 1 <= scale <= grid:
                raise ValueError(
                    f"spatial_scales holds {scale}, but the patch grid is {grid} x {grid}: use 1 to {grid}"
                )
        if len(set(self.spatial_scales)) != len(self.spatial_scales):
            raise ValueError(f"spatial_scales holds a scale twice: {self.spatial_scales}")
        if self.spatial_width < 1:
            raise ValueError(f"spatial_width is {self.spatial_width}; it must be at least 1")
        if self.spatial_fusion and not (1 <= self.fusion_kernel <= grid and self.fusion_stride >= 1):
            raise ValueError(
                f"fusion_kernel is {self.fusion_kernel} and fusion_stride {self.fusion_stride}, but the patch grid is "
                f"{grid} x {grid}: the kernel must lie in 1 to {grid} and the stride be at least 1"
            )

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
    def num_patch_tokens(self) -> int:
        """N = G * G."""
        return self.grid_size**2

    @property
    def num_spatial_tokens(self) -> int:
        """S: one token per scale."""
        return 0 if self.spatial_variant == "none" else len(self.spatial_scales)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image: S spatial tokens, then N patch tokens."""
        return self.num_spatial_tokens + self.num_patch_tokens


def _square_side(size, name: str) -> int:
    """The side of a square given as one number or as two equal ones."""
    if isinstance(size, (list, tuple)):
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f"the vision tower's {name} is {tuple(size)}; the spatial tokens need a square grid")
        size = size[0]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"the vision tower's {name} is {size!r}; it must be a positive number of pixels")
    return size


LlavaSPConfig.register_for_auto_class()

__all__ = ["LlavaSPConfig"]
