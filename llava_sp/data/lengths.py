"""Exact lengths of all records: tokenized once, in parallel, without decoding an image; kept beside the annotations.

`data.json` has `data.json.lengths-KEY.npz`; KEY stands for what lengths depend on: the file's content, the tokenizer, the
conversation template, the number of image tokens, `model_max_length`. Where that folder cannot be written, the file is in
the run's output_dir.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_sp.common.files import replacing, sha256, writing
from llava_sp.common.schema import expect
from llava_sp.data.annotations import BadSample
from llava_sp.data.passes import in_order
from llava_sp.model.conversation import IMAGE_MARK, get_template

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset

VERSION = 1  # another one where lengths, or what is kept of them, change
WORTH_WORKERS = 2000  # records; fewer are measured before processes have started
BATCH = 128
REASONS = {str: str}
# Raised by numpy and zipfile for files that are damaged or something else
_DAMAGED = (
    OSError, ValueError, LookupError, EOFError, RuntimeError, TypeError, AttributeError, MemoryError, OverflowError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lengths:
    """What each record of a file comes to. [records] each.

    Attributes:
        tokens: after cutting to `model_max_length`, image tokens included; 0 for a bad record.
        uncut: tokens before cutting.
        learned: tokens with a label.
        images: images that the record names.
        marks: image marks in its text.
        reasons: why a record is bad, by its index. Its images may be bad besides.
    """

    tokens: np.ndarray
    uncut: np.ndarray
    learned: np.ndarray
    images: np.ndarray
    marks: np.ndarray
    reasons: dict[int, str]


COLUMNS = [field.name for field in fields(Lengths) if field.name != "reasons"]


def measure(dataset: ConversationDataset, workers: int = 0, spare: Path | None = None) -> list[Lengths]:
    """The lengths of each file's records, from their caches where these fit.

    Args:
        workers: processes that tokenize; 0 is this one.
        spare: folder for what cannot be written beside the annotations.
    """
    return [_measure_file(dataset, source, workers, spare) for source in range(len(dataset.files))]


def _measure_file(dataset: ConversationDataset, source: int, workers: int, spare: Path | None) -> Lengths:
    annotations, key = dataset.files[source].path, _key(dataset, source)
    name = f"{annotations.name}.lengths-{key[:12]}.npz"
    folders = [annotations.parent] + ([] if spare is None else [spare])
    for file in (folder / name for folder in folders):
        if file.is_file():
            try:
                return _read(file, key, len(dataset.files[source]))
            except _DAMAGED as error:
                logger.warning("%s cannot be used (%s); the lengths are measured again.", file, error)
    started = time.monotonic()
    lengths = _tokenize(dataset.whole_file(source), workers, annotations.name)
    count, seconds = len(lengths.tokens), max(time.monotonic() - started, 1e-3)
    kept = next(
        (str(folder / name) for folder in folders if _write(folder / name, key, lengths)), "no file: not writable"
    )
    text = "Measured %s records of %s in %.1f s (%s records/s); kept in %s."
    logger.info(text, f"{count:,}", annotations, seconds, f"{count / seconds:,.0f}", kept)
    return lengths


def _key(dataset: ConversationDataset, source: int) -> str:
    processor = dataset.processor
    name = dataset.conversation_template or processor.conversation_template
    tokenizer = processor.tokenizer
    parts = {
        "version": VERSION,
        "annotations": sha256(dataset.files[source].path),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, processor.image_token],
        "template": [name, repr(get_template(name)), processor.chat_template, tokenizer.chat_template],
        "image_tokens": processor.num_image_tokens,
        "model_max_length": dataset.model_max_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()


class _Rows:
    """`[i]` is the row of `COLUMNS` of sample `i`, and why it is bad or ""."""

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[list[int], str]:
        try:
            conversation = self.dataset.conversation(index)
            encoded = self.dataset.encode(conversation)
        except BadSample as error:
            return [0] * len(COLUMNS), str(error)
        learned = sum(label >= 0 for label in encoded.labels)
        marks = sum(turn["content"].count(IMAGE_MARK) for turn in conversation.turns)
        return [len(encoded.input_ids), encoded.uncut, learned, len(conversation.images), marks], ""


def _tokenize(dataset: ConversationDataset, workers: int, name: str) -> Lengths:
    workers = workers if len(dataset) >= WORTH_WORKERS else 0
    table, reasons = np.zeros((len(dataset), len(COLUMNS)), dtype=np.int32), {}
    for index, (row, reason) in enumerate(in_order(_Rows(dataset), workers, BATCH, f"measuring {name}")):
        table[index] = row
        if reason:
            reasons[index] = reason
    return _as_lengths(np.ascontiguousarray(table.T), reasons)


def _read(file: Path, key: str, records: int) -> Lengths:
    """Raises one of `_DAMAGED` for a file that is not these records' cache."""
    with np.load(file, allow_pickle=False) as kept:
        if str(kept["key"]) != key:
            raise ValueError("it belongs to other data, another tokenizer or template")
        table, text = kept["table"], kept["reasons"].tobytes().decode()
    if table.shape != (len(COLUMNS), records) or table.dtype != np.int32:
        raise ValueError(f"it holds {table.dtype} {table.shape}")
    reasons = {int(index): reason for index, reason in expect(json.loads(text), REASONS, file).items()}
    if sorted(reasons) != np.flatnonzero(table[0] == 0).tolist():
        raise ValueError("its bad records have no reasons")
    return _as_lengths(table, reasons)


def _as_lengths(table: np.ndarray, reasons: dict[int, str]) -> Lengths:
    return Lengths(**dict(zip(COLUMNS, table, strict=True)), reasons=reasons)


def _write(file: Path, key: str, lengths: Lengths) -> bool:
    """False if the folder is not writable."""
    reasons = np.frombuffer(json.dumps(lengths.reasons).encode(), dtype=np.uint8)
    table = np.stack([getattr(lengths, column) for column in COLUMNS])
    try:
        with writing(file), replacing(file) as part, part.open("wb") as stream:
            np.savez_compressed(stream, key=np.array(key), table=table, reasons=reasons)
    except OSError:
        return False
    return True
