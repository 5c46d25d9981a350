"""One tiny checkpoint of every format, made of the recorded one (cropping), and ways to spoil a copy."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.common.files import sha256
from tests.released import load_released, released_folder

NAMES = ("original_lora", "original_projector", "original_full", "llava_sp_adapter", "llava_sp", "llava_hf")
WRAPPER = "base_model.model."  # PEFT's, before the original's keys


@dataclass
class Kind:
    """A checkpoint: its folder, what opening it needs, and the key of one of its tensors."""

    folder: Path
    key: str
    keywords: dict = field(default_factory=dict)

    def copy(self, to: Path) -> Kind:
        shutil.copytree(self.folder, to, copy_function=shutil.copyfile)
        return Kind(to, self.key, self.keywords)

    @property
    def file(self) -> Path:
        """The file that holds the tensor."""
        for file in sorted([*self.folder.rglob("*.safetensors"), *self.folder.rglob("*.bin")]):
            if self.key in load(file):
                return file
        raise AssertionError(f"{self.key} is in no file of {self.folder}")

    def edit(self, change) -> Path:
        """Let `change` work on the file's tensors; the manifest of an adapter of ours follows."""
        file = self.file
        tensors = load(file)
        change(tensors)
        save(tensors, file)
        manifest = self.folder / "llava_sp.json"
        if manifest.is_file():
            about = json.loads(manifest.read_text())
            now = {"bytes": file.stat().st_size, "sha256": sha256(file)}
            about["files"][str(file.relative_to(self.folder))] = now
            manifest.write_text(json.dumps(about))
        return file

    def open(self, **keywords) -> LlavaSPForCausalLM:
        return LlavaSPForCausalLM.from_pretrained(self.folder, **self.keywords, **keywords)


def load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def save(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})
    else:
        torch.save(tensors, file)


def build(golden: Path, root: Path) -> dict[str, Kind]:
    tower = {"vision_tower": golden / "clip"}
    both = {"language_model": golden / "base", **tower}
    kinds = {
        "original_lora": Kind(root / "original_lora", f"{WRAPPER}model.conv_8.weight", both),
        "original_projector": Kind(root / "original_projector", "model.conv_8.weight", both),
        "original_full": Kind(root / "original_full", "model.conv_8.weight", tower),
        "llava_sp_adapter": Kind(root / "llava_sp_adapter", "spatial.linear.weight"),
        "llava_sp": Kind(root / "llava_sp", "model.multi_modal_projector.spatial.linear.weight"),
        "llava_hf": Kind(root / "llava_hf", "language_model.model.layers.1.mlp.up_proj.weight"),
    }
    shutil.copytree(golden / "checkpoint_cropping/lora", kinds["original_lora"].folder, copy_function=shutil.copyfile)
    kinds["original_projector"].folder.mkdir()
    for name in ("model.bin", "config.json"):
        shutil.copyfile(golden / "pretrain_artifacts/cropping" / name, kinds["original_projector"].folder / name)
    _write_original_full(golden, kinds["original_full"].folder)
    model = load_released(golden, "cropping")
    processor = LlavaSPProcessor.from_backbones(model.config)
    save_adapter(model, processor, kinds["llava_sp_adapter"].folder, run={"stage": "finetune_lora", "step": 7})
    model = load_released(golden, "cropping", lora=False)
    model.save_pretrained(kinds["llava_sp"].folder, max_shard_size="1MB")
    processor.save_pretrained(kinds["llava_sp"].folder)
    _write_llava_hf(golden, kinds["llava_hf"].folder)
    return kinds


def _write_original_full(golden: Path, folder: Path) -> None:
    """As the original code saves a fully finetuned model: two shards and an index."""
    folder.mkdir()
    tensors = {k: t for file in sorted((golden / "base").glob("*.bin")) for k, t in load(file).items()}
    trained = load(golden / "checkpoint_cropping/lora/non_lora_trainables.bin")
    tensors |= {key.removeprefix(WRAPPER): tensor for key, tensor in trained.items()}
    keys = list(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in range(2)}
    for name, held in shards.items():
        save({key: tensors[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in shards.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _copy_tokenizer(golden, folder)
    shutil.copyfile(golden / "checkpoint_cropping/lora/config.json", folder / "config.json")


def _write_llava_hf(golden: Path, folder: Path) -> None:
    torch.manual_seed(0)
    text = AutoConfig.from_pretrained(golden / "base", vocab_size=1064)
    vision = AutoConfig.from_pretrained(golden / "clip").vision_config
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=1000)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _copy_tokenizer(golden, folder)


def _copy_tokenizer(golden: Path, folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(golden / "base" / name, folder / name)


def llava_15(golden: Path) -> LlavaSPForCausalLM:
    """A model without spatial tokens, in float32."""
    return LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", spatial_variant="none", dtype=torch.float32
    )


def write_ours(folder: Path, model: LlavaSPForCausalLM) -> Path:
    """Our full checkpoint of a model, with its processor."""
    model.save_pretrained(folder)
    LlavaSPProcessor.from_backbones(model.config).save_pretrained(folder)
    return folder


def original_keys(model, golden, tower: bool, words: int = 1000) -> dict[str, torch.Tensor]:
    """The model's weights as LLaVA-1.5's own code names them."""
    keys = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if name.startswith("model.multi_modal_projector."):
            name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
            keys[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = tensor
        elif name.startswith("model.vision_tower."):
            if tower:
                keys[name.replace("vision_tower.", "vision_tower.vision_tower.vision_model.")] = tensor
        else:
            rows = words if "embed_tokens" in name or "lm_head" in name else len(tensor)
            keys[name.replace("language_model.", "")] = tensor[:rows].contiguous()
    return keys


def write_original(folder, model, golden, tower: bool, beside: bool, safetensors: bool = True) -> None:
    """A full LLaVA-1.5 folder: its projector within or beside, with or without the tower's weights."""
    folder.mkdir()
    for file in (golden / "base").glob("*token*"):
        shutil.copy(file, folder)
    settings = json.loads((released_folder(golden, "cropping") / "config.json").read_text())
    settings |= {"mm_vision_tower": str(golden / "clip"), "architectures": ["LlavaLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    keys = original_keys(model, golden, tower)
    if beside:
        projector = {key: keys.pop(key) for key in list(keys) if "mm_projector" in key}
        torch.save(projector, folder / "mm_projector.bin")
    keys = {key: tensor.clone() for key, tensor in keys.items()}
    if safetensors:
        save_file(keys, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(keys, folder / "pytorch_model.bin")


def spoil(tensor: Tensor, how: str) -> Tensor:
    """A tensor that no training leaves."""
    tensor = tensor.clone()
    if how in ("nan", "inf"):
        tensor.view(-1)[3] = float(how)
    elif how == "empty":
        tensor = tensor.new_zeros(0)
    elif how == "shape":
        tensor = tensor[..., :-1].clone()
    elif how == "huge":
        tensor *= 1e20
    elif how == "denormal":
        tensor.fill_(1e-40)
    else:
        assert how == "zeros"
        tensor.zero_()
    return tensor
