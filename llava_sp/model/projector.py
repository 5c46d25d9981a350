"""From patch features to image tokens: LLaVA-1.5's patch MLP and, before its tokens, LLaVA-SP's spatial tokens.

Shape suffixes: B images, G grid side, N = G * G patches, S spatial tokens, P positions of the integrator's windows,
C vision width, K extractor width, D language width, W window side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration_llava_sp import LlavaSPConfig


class WindowProjection(nn.Module):
    """A bias-free convolution whose kernel covers its whole input, which is one matrix product.

    The parameter keeps the convolution's shape [K, C, W, W], so weights of the original fit. As a convolution with so
    large a kernel it is several times slower (`python benchmarks/projector.py`).
    """

    def __init__(self, vision_width: int, out_width: int, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, vision_width, window, window))

    def forward(self, windows: Tensor) -> Tensor:
        """windows [..., W, W, C] -> [..., K]"""
        columns = windows.movedim(-1, -3).flatten(-3)
        return F.linear(columns, self.weight.flatten(1))


class SpatialFeatureExtractor(nn.Module):
    """The paper's SFE: one vector per scale. A variant defines the window of a scale; see `Cropping` and `Pooling`.

    To add a variant, subclass this, override `window` (or `forward`), and enter the class in `SPATIAL_VARIANTS`.
    The contract: `num_tokens`, and `forward(patches_BGGC) -> features_BSK`.
    """

    def __init__(self, config: LlavaSPConfig):
        super().__init__()
        scales, width = config.spatial_scales, config.spatial_width
        assert scales and width, "set by the configuration"
        self.scales, self.num_tokens = list(scales), len(scales)
        self.projections = nn.ModuleDict({str(s): WindowProjection(config.vision_width, width, s) for s in scales})

    def window(self, patches_BGGC: Tensor, scale: int) -> Tensor:
        """The window that the token of this scale sees: [B, scale, scale, C]."""
        raise TypeError(f"{type(self).__name__} must define window() or forward()")

    def forward(self, patches_BGGC: Tensor) -> Tensor:
        return torch.stack([self.projections[str(s)](self.window(patches_BGGC, s)) for s in self.scales], dim=1)


class Cropping(SpatialFeatureExtractor):
    """ "From central region to global": a scale sees the centre of the grid, cut out."""

    def window(self, patches_BGGC: Tensor, scale: int) -> Tensor:
        start = (patches_BGGC.shape[1] - scale) // 2
        return patches_BGGC[:, start : start + scale, start : start + scale]


class Pooling(SpatialFeatureExtractor):
    """ "From abstract to specific": a scale sees the whole grid, average-pooled to its size."""

    def window(self, patches_BGGC: Tensor, scale: int) -> Tensor:
        if scale == patches_BGGC.shape[1]:
            return patches_BGGC
        return F.adaptive_avg_pool2d(patches_BGGC.permute(0, 3, 1, 2), scale).permute(0, 2, 3, 1)


SPATIAL_VARIANTS: dict[str, type[SpatialFeatureExtractor]] = {"cropping": Cropping, "pooling": Pooling}


class DetailFeatureIntegrator(nn.Module):
    """The paper's DFI: each spatial feature attends, with one head, to fine windows of the grid."""

    def __init__(self, config: LlavaSPConfig):
        super().__init__()
        kernel, stride, width = config.fusion_kernel, config.fusion_stride, config.spatial_width
        assert kernel and stride and width, "set by the configuration"
        self.kernel, self.stride = kernel, stride
        self.context = WindowProjection(config.vision_width, width, self.kernel)
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.value = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, features_BSK: Tensor, patches_BGGC: Tensor) -> Tensor:
        """-> one attended vector per spatial feature, [B, S, K]; no residual, no output projection."""
        windows = patches_BGGC.unfold(1, self.kernel, self.stride).unfold(2, self.kernel, self.stride)
        context_BPK = self.context(windows.permute(0, 1, 2, 4, 5, 3).flatten(1, 2))
        parts = (self.query(features_BSK), self.key(context_BPK), self.value(context_BPK))
        return F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in parts)).squeeze(
            1
        )  # ONNX supports it with heads


class SpatialBranch(nn.Module):
    """Extractor, optional integrator, then GELU and one linear layer to the language width."""

    def __init__(self, config: LlavaSPConfig):
        super().__init__()
        if config.spatial_variant not in SPATIAL_VARIANTS:
            known = ", ".join(["none", *SPATIAL_VARIANTS])
            raise ValueError(f"spatial_variant is {config.spatial_variant!r}; it must be one of: {known}")
        if config.spatial_width is None:
            raise ValueError(f'spatial_variant was "none", now {config.spatial_variant!r}: make a new configuration')
        self.extractor = SPATIAL_VARIANTS[config.spatial_variant](config)
        if self.extractor.num_tokens != config.num_spatial_tokens:
            found, wanted = self.extractor.num_tokens, config.num_spatial_tokens
            raise ValueError(f"{type(self.extractor).__name__}.num_tokens is {found}; spatial_scales need {wanted}")
        self.integrator = DetailFeatureIntegrator(config) if config.spatial_fusion else None
        in_width = config.spatial_width * (2 if config.spatial_fusion else 1)
        self.act = nn.GELU()
        self.linear = nn.Linear(in_width, config.text_config.hidden_size, bias=bool(config.spatial_projection_bias))

    def forward(self, patches_BGGC: Tensor) -> Tensor:
        features_BSK = self.extractor(patches_BGGC)
        if self.integrator is not None:
            features_BSK = torch.cat([features_BSK, self.integrator(features_BSK, patches_BGGC)], dim=-1)
        return self.linear(self.act(features_BSK))


class SpatialProjector(LlavaMultiModalProjector):
    """patches_BNC -> [B, S + N, D]: the spatial tokens, small scales first, then the patch tokens, row by row.

    With `spatial_variant="none"` there is no spatial branch and this is LLaVA-1.5's projector, key for key.
    """

    def __init__(self, config: LlavaSPConfig):
        super().__init__(config)
        self.grid_size = config.grid_size
        self.spatial = None if config.spatial_variant == "none" else SpatialBranch(config)

    def forward(self, patches_BNC: Tensor) -> Tensor:
        found, side = patches_BNC.shape[1], self.grid_size
        if found != side**2:
            raise ValueError(f"the vision tower gave {found} patch tokens, not a grid of {side} x {side} = {side**2}")
        tokens_BND = super().forward(patches_BNC)
        if self.spatial is None:
            return tokens_BND
        patches_BGGC = patches_BNC.unflatten(1, (side, side))
        return torch.cat([self.spatial(patches_BGGC), tokens_BND], dim=1)

    def reset_parameters(self) -> None:
        """New weights for each layer, see `reset_parameters`."""
        for module in self.modules():
            reset_parameters(module)


@torch.no_grad()
def reset_parameters(module: nn.Module) -> None:
    """Uniform in +- 1/sqrt(fan-in) (standard deviation 1/sqrt(3 fan-in)), as torch draws a new layer.

    Parameters that came from a checkpoint stay (`init` skips those marked as loaded).
    """
    if isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, (nn.Linear, WindowProjection)):
        bound = module.weight[0].numel() ** -0.5
        init.uniform_(module.weight, -bound, bound)
        bias = getattr(module, "bias", None)
        if bias is not None:
            init.uniform_(bias, -bound, bound)


__all__ = ["SPATIAL_VARIANTS", "DetailFeatureIntegrator", "SpatialFeatureExtractor", "SpatialProjector"]
