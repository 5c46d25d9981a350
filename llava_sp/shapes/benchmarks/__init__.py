"""The shapes world as every benchmark: small true copies of the official files, to run each evaluator end to end.

    python -m llava_sp.shapes.benchmarks --output runs/benchmarks

    OUTPUT/vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench, mmbench_cn, seedbench, llava_bench, mmvet, mmvp,
    refcoco, qbench     one folder per benchmark, with the files that `python -m llava_sp.eval.<name> --data` reads
    OUTPUT/scenes.json  the scene graph behind every image ("gqa/images/n900000.jpg": ...), to derive every answer again
    OUTPUT/world.json   the settings and the number of questions per benchmark; completed last

All images are held-out scenes with unseen handwriting. The same arguments give the same bytes, and a benchmark written
alone is the one that writing all of them gives. Where `world.json` records the same settings, nothing is made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_sp.common.files import read_json, write_json
from llava_sp.common.schema import fits
from llava_sp.shapes.benchmarks.common import Settings, Written
from llava_sp.shapes.benchmarks.gqa import write_gqa
from llava_sp.shapes.benchmarks.multiple_choice import write_mmbench, write_mmbench_cn, write_scienceqa, write_seedbench
from llava_sp.shapes.benchmarks.open_ended import write_llava_bench, write_mmvet
from llava_sp.shapes.benchmarks.short_answers import write_textvqa, write_vizwiz, write_vqav2
from llava_sp.shapes.benchmarks.visual_details import write_mmvp, write_qbench, write_refcoco
from llava_sp.shapes.benchmarks.yes_no import write_mme, write_pope

__all__ = ["WRITERS", "Settings", "Written", "write_all"]

# Benchmark -> its writer: `write(folder, settings)` makes the folder and returns what it wrote
WRITERS: dict[str, Callable[[Path, Settings], Written]] = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "vizwiz": write_vizwiz,
    "scienceqa": write_scienceqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "mmbench": write_mmbench,
    "mmbench_cn": write_mmbench_cn,
    "seedbench": write_seedbench,
    "llava_bench": write_llava_bench,
    "mmvet": write_mmvet,
    "mmvp": write_mmvp,
    "refcoco": write_refcoco,
    "qbench": write_qbench,
}


def write_all(output: Path, settings: Settings | None = None, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Write every benchmark under `output`; returns what `world.json` holds.

    A folder that this function made is made again where the settings differ or an earlier call was interrupted. Raises
    `ValueError` for a folder of something else.
    """
    settings = settings or Settings()
    record = output / "world.json"
    found = _record(record)
    if found is not None and found["settings"] == asdict(settings) and found["complete"]:
        log(f"shapes benchmarks: {output} is complete, nothing to make")
        return found
    if found is None and output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} holds other files; give a new folder or one that this command made")
    if found is not None:
        for name in WRITERS:
            shutil.rmtree(output / name, ignore_errors=True)
    summary: dict[str, Any] = {"settings": asdict(settings), "complete": False, "benchmarks": {}}
    write_json(record, summary)
    scenes: dict[str, Any] = {}
    for name, write in WRITERS.items():
        written = write(output / name, settings)
        summary["benchmarks"][name] = {"questions": written.questions, "pictures": len(written.scenes)}
        scenes |= {f"{name}/{image}": scene for image, scene in written.scenes.items()}
        log(f"shapes benchmarks: {written.questions} questions -> {output / name}")
    write_json(output / "scenes.json", scenes)
    summary["complete"] = True
    write_json(record, summary)
    return summary


def _record(file: Path) -> dict[str, Any] | None:
    """The content of `world.json`; None where it does not exist, or is another command's."""
    if not file.is_file():
        return None
    found = read_json(file)
    return found if fits(found, {"settings": dict, "complete": bool, "benchmarks": dict}) else None
