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
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import command_parser, fitting, natural, run_command
from llava_sp.common.files import counted, write_jsonl
from llava_sp.common.schema import whole
from llava_sp.data.annotations import BadSample
from llava_sp.model.conversation import IMAGE_MARK

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset
    from llava_sp.data.duplicates import Repeats


class _Look:
    """`[i]` is `(i, tokens, tokens before cutting, learned tokens, images, image marks, reason it is bad or "")`."""

    def __init__(self, dataset: ConversationDataset, full: bool):
        self.dataset, self.full = dataset, full

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int, int, int, int, str]:
        try:
            conversation = self.dataset.conversation(index)
            encoded = self.dataset.encode(conversation)
            (self.dataset.load_images if self.full else self.dataset.look_at_images)(index, conversation)
        except BadSample as error:
            return index, 0, 0, 0, 0, 0, str(error)
        learned = sum(label >= 0 for label in encoded.labels)
        marks = sum(turn["content"].count(IMAGE_MARK) for turn in conversation.turns)
        return index, len(encoded.input_ids), encoded.uncut, learned, len(conversation.images), marks, ""


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
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from llava_sp.data.duplicates import find_repeats

    dataset = dataset.distinct()
    findings = Findings()
    looks: Any = _Look(dataset, full)
    loader: DataLoader = DataLoader(looks, batch_size=32 if workers else 1, num_workers=workers, collate_fn=list)
    with tqdm(total=len(dataset), unit="sample", disable=None) as progress:
        for batch in loader:
            for index, tokens, uncut, learned, images, marks, reason in batch:
                if reason:
                    file, record = dataset.origin(index)
                    findings.bad.append({"file": file, "index": record, "reason": reason})
                    continue
                findings.tokens.append(tokens)
                findings.cut += uncut > tokens
                findings.learned += learned
                findings.with_image += images > 0
                findings.spelled += marks > images == 0
            progress.update(len(batch))
    findings.repeats = find_repeats(dataset, workers)
    return findings


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
    if findings.repeats and findings.repeats.same:
        again, first = findings.repeats.same[0]
        lines.append(f"{len(findings.repeats.same)} records repeat another: sample {again} is sample {first} again")
    if findings.repeats and findings.repeats.empty:
        empty = findings.repeats.empty
        lines.append(f"{len(empty)} records teach nothing but the end of an answer: sample {empty[0]}")
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
