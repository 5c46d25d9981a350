"""Saved models: bit-equal, known to the Auto classes, and open where the package is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening.adapter import save_adapter

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def test_save_and_load_is_bit_equal(model, saved):
    again = LlavaSPForCausalLM.from_pretrained(saved)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert again.generation_config.pad_token_id == 1001


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_auto_classes_and_device_map(saved, images, device_map):
    model = AutoModelForImageTextToText.from_pretrained(saved, device_map=device_map)
    processor = AutoProcessor.from_pretrained(saved)
    assert type(model) is LlavaSPForCausalLM and type(processor) is LlavaSPProcessor
    assert type(AutoConfig.from_pretrained(saved)) is LlavaSPConfig
    assert model.generate(**processor(text=PROMPT, images=images[:1]), max_new_tokens=8).shape[0] == 1


def test_pipeline(saved, images):
    answer = pipeline("image-text-to-text", model=str(saved))
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is this?"}]
    result = answer(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(result[0]["generated_text"], str)


def test_a_saved_folder_opens_where_the_package_is_not_installed(model, processor, saved, tmp_path):
    """The folder carries its code: `trust_remote_code` in a process that cannot import llava_sp; an adapter says what it needs."""
    folder, adapter = tmp_path / "pushed", tmp_path / "adapter"
    shutil.copytree(saved, folder)
    save_adapter(model, processor, adapter)
    script = tmp_path / "open.py"
    script.write_text(
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('llava_sp') is None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "from PIL import Image\n"
        "inputs = processor(text='USER: <image>\\nHi ASSISTANT:', images=Image.new('RGB', (50, 40)))\n"
        "print(type(model).__module__, model.generate(**inputs, max_new_tokens=3).shape[1])\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM\n"
        f"print(type(AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)\n"
        f"print(type(AutoConfig.from_pretrained({str(adapter)!r}, trust_remote_code=True)).__name__)\n"
        f"print(type(AutoProcessor.from_pretrained({str(adapter)!r}, trust_remote_code=True)).__name__)\n"
        f"try: AutoModelForMultimodalLM.from_pretrained({str(adapter)!r}, trust_remote_code=True)\n"
        "except ImportError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    # -I leaves out the working directory and PYTHONPATH; an editable install would still be found, hence -S and the paths
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    runner = f"import sys; sys.path += {libraries!r}; exec(open({str(script)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", runner], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    model, *others, needed = done.stdout.splitlines()
    assert model.startswith("transformers_modules.")
    assert others == ["LlavaSPModel", "LlavaSPConfig", "LlavaSPProcessor"]
    assert needed == f"{adapter} is an adapter checkpoint: pip install llava_sp, and import it, to open it"


def test_import_is_light():
    """`import llava_sp` loads neither torch nor anything optional."""
    code = (
        "import sys, llava_sp; "
        "print([m for m in ('torch', 'transformers', 'timm', 'deepspeed', 'peft', 'wandb', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "statement",
    [
        "from llava_sp import LlavaSPForCausalLM",
        "import transformers.models.auto.modeling_auto; import llava_sp",
        "import llava_sp; from transformers import LlavaForConditionalGeneration",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(statement):
    code = f"{statement}; from transformers import AutoConfig, AutoModelForImageTextToText as A, AutoProcessor; " + (
        "config = AutoConfig.for_model('llava_sp'); print(type(config).__name__, type(config) in A._model_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "LlavaSPConfig True", done.stderr


@pytest.mark.parametrize("as_adapter", [False, True])
def test_bitsandbytes(model, saved, processor, images, tmp_path, as_adapter):
    """The language model is loaded in 8 bits; tower, projector and head keep their precision."""
    pytest.importorskip("bitsandbytes", reason="the extra llava_sp[quantize] is not installed")
    from transformers import BitsAndBytesConfig

    if as_adapter:
        save_adapter(model, processor, tmp_path)
    quantized = LlavaSPForCausalLM.from_pretrained(
        tmp_path if as_adapter else saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert "8bit" in type(quantized.model.language_model.layers[0].mlp.up_proj).__name__
    assert type(quantized.model.multi_modal_projector.linear_1) is torch.nn.Linear
    assert type(quantized.lm_head) is torch.nn.Linear
    inputs = processor(text=PROMPT, images=images[:1])
    with torch.no_grad():
        difference = (quantized(**inputs).logits - model(**inputs).logits)[..., :1000]
    assert difference.abs().mean() < 0.3  # the logits' standard deviation is 3
    assert quantized.generate(**inputs, max_new_tokens=8).shape[0] == 1
