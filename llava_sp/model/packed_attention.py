"""Attention in packs: several samples in one row, told apart by positions that start again at 0.

transformers finds packs by these positions, but only if there is no attention mask and no cache; with a cache, samples
would silently attend to each other. Its `sdpa` then computes the whole [L, L] square under a mask. `sdpa_per_sample` computes
the causal triangle of each sample alone; without packs it is `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_SAMPLE = "sdpa_per_sample"
# Implementations that keep the samples of a pack apart
KEEP_APART = (PER_SAMPLE, "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def keep_apart(position_ids_BL: Tensor, implementation: str | None) -> dict[str, Any]:
    """Keywords of the language model that keep the samples of a pack apart; {} where positions do not restart.

    For inputs without attention mask and without cache.
    """
    compiling = torch.compiler.is_compiling()
    starts_BL = torch.diff(position_ids_BL, dim=-1) != 1
    if not compiling and not starts_BL.any():
        return {}
    options: dict[str, Any] = {"use_cache": False}
    if compiling or len(position_ids_BL) > 1:  # transformers' masks are right, only slower
        return options
    length = position_ids_BL.shape[1]
    bounds = torch.nn.functional.pad(starts_BL[0].nonzero().flatten() + 1, (1, 0))
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=length).int()
    if implementation == PER_SAMPLE:
        options["attention_mask"] = bounds.view(1, 1, 1, -1)  # transformers hands on a mask of four dimensions as it is
    elif (
        implementation and "flash" in implementation
    ):  # or it would find them in each layer, and wait for the GPU there
        longest = int(bounds.diff().max())
        options |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return options


def can_attend_per_sample(language_model: Any) -> bool:
    """Whether a language model calls `sdpa` by transformers' interface, over all tokens before (no sliding window, no chunks)."""
    config = language_model.config
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    called = getattr(language_model, "_supports_attention_backend", False)
    return config._attn_implementation == "sdpa" and called and plain and not windowed


def attention_per_sample(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, or, where `attention_mask` holds the bounds of `keep_apart`, causal attention in each sample.

    query [1, heads, L, head width], key and value likewise with as many heads or fewer -> [1, L, heads, head width].

    Raises:
        ValueError: a sliding window shorter than a sample.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    bounds = attention_mask.flatten()
    lengths, window = bounds.diff().tolist(), kwargs.get("sliding_window")
    if window is not None and window < max(lengths):
        raise ValueError(f"attn_implementation {PER_SAMPLE} has no sliding window ({window}); use sdpa")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _in_one_kernel(query, key, value, bounds, max(lengths), scaling), None
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, is_causal=True)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """The same by torch's variable-length flash attention (torch >= 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    grouped: Any = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return out.unsqueeze(0)


AttentionInterface.register(PER_SAMPLE, attention_per_sample)
AttentionMaskInterface.register(PER_SAMPLE, sdpa_mask)
