"""Attention in packs: each sample as if it were alone, in language models of several families; on a GPU by its kernels."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from llava_sp.model.packed_attention import (
    KEEP_APART,
    PER_SAMPLE,
    attention_per_sample,
    can_attend_per_sample,
    keep_apart,
)
from tests.messages import refused

SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, grouped": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8),
    "mistral, window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
}
LENGTHS = (9, 1, 6, 13)


def language_model(family: str, implementation: str = "sdpa"):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(FAMILIES[family]))
    if implementation != "sdpa":
        model.set_attn_implementation(implementation)
    return model


def pack() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 120, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", [PER_SAMPLE, "sdpa", "eager"])
def test_samples_are_as_if_alone(family, implementation):
    model = language_model(family)
    able = can_attend_per_sample(model)
    assert able == ("window" not in family)
    if implementation == PER_SAMPLE and not able:
        pytest.skip("sdpa is chosen for it")
    ids, positions = pack()
    with torch.no_grad():
        alone = [language_model(family, "eager")(input_ids=part).last_hidden_state for part in ids.split(LENGTHS, 1)]
        model.set_attn_implementation(implementation)
        options = keep_apart(positions, implementation)
        assert options["use_cache"] is False
        packed = model(input_ids=ids, position_ids=positions, **options).last_hidden_state
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)


def test_rows_of_one_sample_are_left_alone():
    for positions in (torch.arange(7)[None], torch.arange(7).expand(3, -1), torch.arange(4, 9)[None]):
        assert keep_apart(positions, PER_SAMPLE) == {}


def test_what_each_implementation_is_told():
    _, positions = pack()
    bounds = [0, 9, 10, 16, 29]
    assert keep_apart(positions, PER_SAMPLE)["attention_mask"].tolist() == [[[bounds]]]
    flash = keep_apart(positions, "flash_attention_2")
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == bounds
    assert flash["cu_seq_lens_q"].dtype == torch.int32 and flash["max_length_q"] == flash["max_length_k"] == 13
    for own in ("sdpa", "eager", "flex_attention"):
        assert keep_apart(positions, own) == {"use_cache": False}
    assert keep_apart(positions.expand(2, -1), PER_SAMPLE) == {"use_cache": False}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_padded_rows_and_several_packs_in_a_batch(family):
    """As `sdpa` does them."""
    ids, positions = pack()
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 20:] = 0
    with torch.no_grad():
        for given in ({"attention_mask": mask}, {"position_ids": positions.expand(2, -1), "use_cache": False}):
            ours, theirs = (
                language_model(family, name)(input_ids=ids.repeat(2, 1), **given).last_hidden_state
                for name in (PER_SAMPLE, "sdpa")
            )
            assert torch.equal(ours, theirs)


def test_a_window_shorter_than_a_sample():
    model = language_model("mistral, window", PER_SAMPLE)
    ids, positions = pack()
    with refused(PER_SAMPLE, 4, "sdpa"):
        model(input_ids=ids, position_ids=positions, **keep_apart(positions, PER_SAMPLE))


# ---- on a GPU

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class _Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("groups", [1, 4], ids=["all heads", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_gpu)], ids=["gpu"])
def test_the_kernel_for_packs(groups, dtype, mark):
    """Output and gradients against float32 on the CPU, within what the number format rounds."""
    lengths, heads, width = (700, 33, 1, 400), 8, 64
    random = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), width) for h in (heads, heads // groups, heads // groups)]
    inputs = [torch.randn(shape, generator=random).to(dtype).float() for shape in shapes]
    upstream = torch.randn(1, sum(lengths), heads, width, generator=random).to(dtype).float()
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().view(1, 1, 1, -1)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        states = [state.to(device, kind).requires_grad_() for state in inputs]
        output, _ = attention_per_sample(_Module(groups), *states, bounds.to(device))
        output.backward(upstream.to(device, kind))
        found.append([output.detach(), *(state.grad for state in states)])
    noise = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-3}[dtype]
    for expected, actual in zip(*found):
        assert (actual.float().cpu() - expected).norm() <= noise * expected.norm()


@pytest.mark.parametrize("implementation", KEEP_APART)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_gpu)], ids=["gpu"])
def test_each_implementation_on_a_gpu(implementation, mark):
    """Gradients of a pack are those of its samples one by one."""
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if implementation in packages and importlib.util.find_spec(packages[implementation]) is None:
        pytest.skip(f"{packages[implementation]} is not installed")
    ids, positions = (tensor.cuda() for tensor in pack())
    model = language_model("llama").to("cuda", torch.bfloat16)
    found = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        model.zero_grad()
        if name == "eager":
            outputs = [model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(LENGTHS, 1)]
            output = torch.cat(outputs, 1)
        else:
            output = model(input_ids=ids, position_ids=positions, **keep_apart(positions, name)).last_hidden_state
        output.float().pow(3).sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for expected, actual in zip(*found):
        assert (actual - expected).float().norm() <= 5e-2 * expected.float().norm() + 1e-6
