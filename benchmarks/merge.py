"""Peak memory and time of merging LoRA at growing size, beside the usual way to do it.

    python benchmarks/merge.py [--size 0.25 0.5 1 2 4] [--folder /tmp]
    python benchmarks/merge.py --size 7b                    the real thing: 18 GiB of memory, 30 GiB of disk, on a CPU

Each size is a Llama and a CLIP with random weights in bfloat16 on the disk, in shards (named by the Llama's GiB; "7b" is
Vicuna-7B's and CLIP-L/14-336's shape), with LoRA of rank 128 on its seven linears. Two commands run on it, each a process of
its own:

    merge   `python -m llava_sp.checkpoints.merge`, with its proof: opened, merged, written, opened again, compared
    naive   load all, PEFT's `merge_and_unload()`, save; no proof, so it opens the model once

Base size is that of the two backbones' files. Memory of a process is read every 10 ms: "anonymous" is RssAnon, what it has
taken and the system cannot take back; "resident" is VmHWM, which also counts pages of files mapped for reading, which the
system takes back when it needs them. Prints a table, writes JSON to `benchmarks/results/`, removes what it has made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from frame import RESULTS, machine
from tqdm import tqdm

SHIPPED = Path(__file__).parent.parent / "llava_sp/shapes/backbones"  # for its tokenizer and image settings
# hidden size, layers, intermediate size, heads; size of a shard with weights
LANGUAGE = {
    "tiny": (64, 2, 128, 4, "100MB"),
    "0.25": (1024, 5, 2816, 8, "100MB"),
    "0.5": (1024, 16, 2816, 8, "200MB"),
    "1": (1536, 15, 4224, 12, "400MB"),
    "2": (2048, 18, 5632, 16, "800MB"),
    "4": (2560, 25, 7040, 20, "1500MB"),
    "7b": (4096, 32, 11008, 32, "5GB"),
}
TOWER = {"tiny": (32, 2, 64, 2), "small": (256, 4, 1024, 4), "7b": (1024, 24, 4096, 16)}
LORA_LAYERS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
GIB = 2**30


def make_backbones(size: str, folder: Path, device: str = "cpu") -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    *language, shard = LANGUAGE[size]
    tower = TOWER.get(size, TOWER["small"])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    llama = LlamaConfig(**dict(zip(FIELDS, language)), vocab_size=32000)
    with torch.device(device):  # 7B take minutes on a CPU
        LlamaForCausalLM(llama).save_pretrained(folder / "base", max_shard_size=shard)
    clip = CLIPVisionConfig(**dict(zip(FIELDS, tower)), image_size=336, patch_size=14)
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SHIPPED / "llama" / name, folder / "base")
    shutil.copy(SHIPPED / "clip/preprocessor_config.json", folder / "clip")


def make_adapter(folder: Path) -> None:
    """LoRA that changes each weight by some percent, as training does, and a fresh projector."""
    from peft import LoraConfig

    from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
    from llava_sp.checkpoints.opening.adapter import save_adapter

    model = LlavaSPForCausalLM.from_backbones(folder / "base", folder / "clip")
    model.add_adapter(LoraConfig(r=128, lora_alpha=256, target_modules=LORA_LAYERS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.002)
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), folder / "adapter")


def merge_naively(folder: Path, shard: str) -> None:
    from peft import PeftModel

    from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor
    from llava_sp.checkpoints.opening.adapter import load_projector

    adapter = folder / "adapter"
    config = LlavaSPConfig.from_pretrained(adapter)
    model = LlavaSPForCausalLM.from_backbones(folder / "base", folder / "clip", config=config)
    load_projector(model, adapter)
    merged = PeftModel.from_pretrained(model, str(adapter / "lora")).merge_and_unload()
    merged.save_pretrained(folder / "naive", max_shard_size=shard)
    LlavaSPProcessor.from_pretrained(adapter).save_pretrained(folder / "naive")


def measured(command: list[str]) -> dict:
    """Run a command; its seconds and its peaks of memory, in GiB."""
    peaks = {"RssAnon": 0, "VmHWM": 0}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()[-3000:]}")
    return {"seconds": seconds, "anonymous_gib": peaks["RssAnon"] / GIB, "resident_gib": peaks["VmHWM"] / GIB}


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def measure(size: str, parent: Path) -> dict:
    """One row of the table: models are made, merged both ways, and removed."""
    shard = LANGUAGE[size][-1]
    with tempfile.TemporaryDirectory(dir=parent, prefix="merge_benchmark_") as name:
        folder = Path(name)
        for step in ("make_backbones", "make_adapter"):
            measured([sys.executable, __file__, "--step", step, "--size", size, "--folder", name])
        base = file_bytes(folder / "base") + file_bytes(folder / "clip")
        ways = {
            "merge": [sys.executable, "-m", "llava_sp.checkpoints.merge", f"{name}/adapter", "--to", f"{name}/merged"],
            "naive": [sys.executable, __file__, "--step", "merge_naively", "--size", size, "--folder", name],
        }
        ways["merge"] += ["--max-shard-size", shard]
        row = {"size": size, "base_gib": base / GIB, "adapter_gib": file_bytes(folder / "adapter") / GIB}
        for way, command in ways.items():
            row[way] = measured(command)
            row[way]["above_base_gib"] = row[way]["anonymous_gib"] - row["base_gib"]
            row[way]["base_gib_per_second"] = row["base_gib"] / row[way]["seconds"]
            if way == "merge":
                row["proof"] = json.loads((folder / "merged/merged.json").read_text())["proof"]
                row["shards"] = len(list((folder / "merged").glob("*.safetensors")))
                shutil.rmtree(folder / "merged")
    return row


def run_step(step: str, size: str, folder: Path) -> None:
    if step == "make_backbones":
        make_backbones(size, folder)
    elif step == "make_adapter":
        make_adapter(folder)
    else:
        merge_naively(folder, LANGUAGE[size][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(LANGUAGE), default=["0.25", "0.5", "1", "2", "4"])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the models (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "merge_cpu.json")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.size[0], arguments.folder)
        return

    rows = []
    tqdm.write("GiB             ---------------- merge, proven ---------------   --------- naive, unproven ---------")
    tqdm.write(
        "size    base    anonymous  above base  resident       s  GiB/s   anonymous  above base  resident       s"
    )
    for size in tqdm(arguments.size, unit="size"):
        row = measure(size, arguments.folder)
        rows.append(row)
        ours, naive = row["merge"], row["naive"]
        tqdm.write(
            f"{size:6} {row['base_gib']:5.2f}   {ours['anonymous_gib']:10.2f} {ours['above_base_gib']:11.2f} "
            f"{ours['resident_gib']:9.2f} {ours['seconds']:7.1f} {ours['base_gib_per_second']:6.3f}  "
            f"{naive['anonymous_gib']:10.2f} {naive['above_base_gib']:11.2f} {naive['resident_gib']:9.2f} {naive['seconds']:7.1f}"
        )
    about = machine("cpu")
    for package in ("transformers", "peft", "safetensors"):
        about[package] = __import__(package).__version__
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
