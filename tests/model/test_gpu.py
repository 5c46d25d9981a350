"""What only a CUDA GPU shows: bash scripts/test.sh -m gpu"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from llava_sp import LlavaSPProcessor
from tests.released import LAYOUTS, load_released

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 5e-3), (torch.float16, 0.4), (torch.bfloat16, 2.0)])
def test_the_gpu_gives_the_logits_of_the_cpu(golden, layout, dtype, noise):
    """Logits have a standard deviation of 3; the original's move by 0.06 to 0.4 in float16."""
    model = load_released(golden, layout)
    processor = LlavaSPProcessor.from_backbones(model.config)
    image = Image.open(golden / "samples/images/wide.png")
    inputs = processor(text="USER: <image>\nWhat is this? ASSISTANT:", images=image)
    with torch.no_grad():
        expected = model(**inputs).logits[..., :1000]
        model.to("cuda", dtype)
        actual = model(**inputs.to("cuda")).logits[..., :1000].float().cpu()
    assert (actual - expected).abs().max() <= noise


def test_generation_and_training_step(golden):
    model = load_released(golden, "cropping").to("cuda", torch.bfloat16)
    processor = LlavaSPProcessor.from_backbones(model.config)
    image = Image.open(golden / "samples/images/wide.png")
    inputs = processor(text=["USER: <image>\nHi ASSISTANT:", "Hi"], images=image, padding=True).to("cuda")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 2
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_the_projector_benchmark_runs(repo, tmp_path):
    command = [sys.executable, "benchmarks/projector.py", "--batch", "4", "--dtype", "bfloat16", "--output"]
    subprocess.run([*command, str(tmp_path / "out.json")], cwd=repo, check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows and all(row["product"]["ms"] > 0 for row in rows)
