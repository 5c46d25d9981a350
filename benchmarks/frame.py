"""What all benchmarks share: the machine's facts, time and peak memory of an action, the JSON file of results."""

from __future__ import annotations

import gc
import json
import platform
import re
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """As it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", machine(device)["device"].lower()).strip("-") if device == "cuda" else "cpu"


def default_device(given: str | None = None) -> str:
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def device_of_size(size: str, given: str | None) -> str:
    """Raises `ValueError` for the real size on a CPU."""
    device = default_device(given)
    if size == "7b" and device != "cuda":
        raise ValueError("--size 7b needs a CUDA GPU; a smaller --size runs the same code on a CPU")
    return device


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any], device: str) -> float:
    """How long an action takes."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def own_seconds(action: Callable[[], Any], device: str) -> float:
    """On a CPU with one thread the process's own time, which other work on the machine disturbs less; else as `seconds`."""
    if device == "cuda" or torch.get_num_threads() > 1:
        return seconds(action, device)
    start = time.process_time()
    action()
    return time.process_time() - start


def peak_and_seconds(action: Callable[[], Any], device: str) -> tuple[int, float]:
    """Bytes at the peak of an action above what was in use before, and how long it took.

    On a CPU these are of the process's resident memory, which grows only if nothing of that size was freed before.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds(action, device)
        return torch.cuda.max_memory_allocated() - before, took
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    took = seconds(action, device)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before, took


def write_results(name: str, arguments: Namespace, found: dict[str, Any]) -> Path:
    """Write settings and results to `arguments.output`, or results/NAME_DEVICE.json."""
    about = machine(arguments.device)
    output = arguments.output or RESULTS / f"{name}_{device_name(arguments.device)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "traceback", "case")}
    output.write_text(json.dumps({"machine": about, "settings": settings, **found}, indent=1, default=str) + "\n")
    print(f"written to {output}")
    return output
