"""Check all training data before training: bad samples, lengths, cut and learned tokens.

    python -m llava_sp.data.check --config configs/finetune_lora_7b_cropping.yaml [--full] [--workers 8] [--output bad.jsonl]
        [--html report.html] [--manifest data.json] [--key value]

Every record is checked once, regardless of its weight: its form, its tokens, that its images are there and begin as images.
--full decodes them, which alone finds damage further in, and takes most of the time. Records that are there twice and answers
without text are counted; they are not bad. --manifest keeps sizes and fingerprint for the key data_manifest of a run. Exit
status: 1 for a bad sample, 2 for a configuration that cannot be used.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from argparse import Namespace
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sp.common.command import command_parser, fitting, natural, run_command
from llava_sp.common.files import counted, write_jsonl
from llava_sp.common.schema import whole
from llava_sp.data.annotations import BadSample
from llava_sp.model.conversation import IMAGE_MARK

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset
    from llava_sp.data.duplicates import Repeats


class _Images:
    """`[i]` is why the images of the sample `indices[i]` cannot be used, or ""."""

    def __init__(self, dataset: ConversationDataset, indices: list[int], full: bool):
        self.dataset, self.indices, self.full = dataset, indices, full

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> str:
        index = self.indices[place]
        try:
            look = self.dataset.load_images if self.full else self.dataset.look_at_images
            look(index, self.dataset.conversation(index))
        except BadSample as error:
            return str(error)
        return ""


@dataclass
class Findings:
    """The result of `look_at_all`."""

    bad: list[dict] = field(default_factory=list)  # {"file", "index", "reason"}
    tokens: array[int] = field(default_factory=lambda: array("i"))  # of the good samples, after cutting
    cut: int = 0
    learned: int = 0
    with_image: int = 0
    spelled: int = 0  # without an image, but with an image mark
    repeats: Repeats | None = None


def look_at_all(dataset: ConversationDataset, workers: int = 0, full: bool = True) -> Findings:
    """Check every record of `dataset` once; bad samples are listed, not raised. `full` decodes the images."""
    import numpy as np

    from llava_sp.data.duplicates import find_repeats
    from llava_sp.data.lengths import COLUMNS, measure
    from llava_sp.data.passes import in_order

    dataset = dataset.distinct()
    files = measure(dataset, workers)
    column = {name: dataset.per_sample([getattr(file, name) for file in files]) for name in COLUMNS}
    reasons = {index: files[source].reasons[record] for index, source, record in dataset.places(column["tokens"] == 0)}
    with_image = np.flatnonzero((column["tokens"] > 0) & (column["images"] > 0)).tolist()
    images = _Images(dataset, with_image, full)
    found = in_order(images, workers, batch_size=32 if workers else 1, what="images", unit="sample")
    for index, reason in zip(with_image, found, strict=True):
        if reason:
            reasons[index] = reason
    bad = []
    for index in sorted(reasons):
        file, record = dataset.origin(index)
        bad.append({"file": file, "index": record, "reason": reasons[index]})
    good = np.setdiff1d(np.arange(len(dataset)), list(reasons))
    tokens, uncut, learned, images_of, marks = (column[name][good] for name in COLUMNS)
    return Findings(
        bad=bad,
        tokens=array("i", tokens.astype("int32").tobytes()),
        cut=int((uncut > tokens).sum()),
        learned=int(learned.sum()),
        with_image=int((images_of > 0).sum()),
        spelled=int(((marks > 0) & (images_of == 0)).sum()),
        repeats=find_repeats(dataset, workers),
    )


def summary(findings: Findings, limit: int, show: int) -> str:
    """The findings as text; at most `show` bad samples are listed."""
    good = len(findings.tokens)
    lines = [
        f"{counted(good + len(findings.bad), 'record')}: {good} good ({findings.with_image} with images), {len(findings.bad)} bad"
    ]
    if good:
        tokens, total = findings.tokens, sum(findings.tokens)
        lines += [
            f"tokens per sample: {min(tokens)} to {max(tokens)}, median {statistics.median(tokens):.0f}, mean {total / good:.1f}; "
            f"{findings.cut} cut at {limit}",
            f"learned: {findings.learned} of {total} tokens ({100 * findings.learned / total:.1f} %)",
        ]
    if findings.spelled:
        lines.append(
            f"{findings.spelled} good records without an image hold {IMAGE_MARK}: it is text there, as in LLaVA"
        )
    repeats = findings.repeats
    if repeats and repeats.same:
        lines.append(f"there twice: {counted(repeats.same, 'record')}; {repeats.first_same}")
    if repeats and repeats.empty:
        lines.append(f"answers without text: {counted(repeats.empty, 'record')}; {repeats.first_empty}")
    lines += [f"  {entry['file']}, record {entry['index']}: {entry['reason']}" for entry in findings.bad[:show]]
    if len(findings.bad) > show:
        lines.append(f"  ... and {len(findings.bad) - show} more (--output lists them all)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("llava_sp.data.check", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="training YAML")
    parser.add_argument(
        "--workers", type=fitting(whole(0, 1024)), default=min(8, os.cpu_count() or 1), help="reading processes"
    )
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument("--html", type=Path, help="write a page with a histogram of the lengths")
    parser.add_argument("--manifest", type=Path, help="write sizes and fingerprint, for the key data_manifest of a run")
    parser.add_argument("--output", type=Path, help="JSONL file for the bad samples")
    parser.add_argument("--show", type=natural, default=20, help="how many bad samples to print")
    options, overrides = parser.parse_known_args(arguments)
    return run_command(lambda: print_findings(options, overrides), traceback=options.traceback)


def print_findings(options: Namespace, overrides: list[str]) -> int:
    from llava_sp.common.files import write_atomic
    from llava_sp.data.build import dataset_of_config
    from llava_sp.data.check_page import check_page
    from llava_sp.data.manifest import write_manifest

    dataset = dataset_of_config(options.config, overrides)
    for source, file in zip(dataset.sources, dataset.files, strict=True):
        print(f"{file.path}: {counted(len(file), 'record')}, weight {source.weight:g}, images in {source.images}")
    started = time.monotonic()
    findings = look_at_all(dataset, options.workers, options.full)
    found = summary(findings, dataset.model_max_length, options.show)
    seconds = max(time.monotonic() - started, 1e-3)
    checked = len(findings.tokens) + len(findings.bad)
    decoded = "images decoded" if options.full else "images not decoded: --full"
    print(f"{found}\nchecked in {seconds:.1f} s ({checked / seconds:,.0f} records/s; {decoded})")
    if options.output:
        write_jsonl(options.output, findings.bad)
    if options.html:
        title = f"Data of {options.config}"
        write_atomic(options.html, check_page(title, found, findings.tokens, dataset.model_max_length, findings.bad))
    if options.manifest:
        figures = {"good": len(findings.tokens), "bad": len(findings.bad), "tokens": sum(findings.tokens)}
        write_manifest(options.manifest, dataset, figures | {"learned": findings.learned, "cut": findings.cut})
    return 1 if findings.bad else 0


if __name__ == "__main__":
    sys.exit(main())
