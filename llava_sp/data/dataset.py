"""ConversationDataset: a mixture of LLaVA annotation files as ids, labels and pixels.

A bad sample (see `BadSample`) ends the run with its file and index, or is replaced by the next good
one and listed: `on_bad_sample="fail"` or `"skip"`. Text beyond `model_max_length` is cut, which is listed too;
an image is never cut.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava_sp.common.files import counted
from llava_sp.common.schema import expect, one_of, some
from llava_sp.data.annotations import BadSample, Conversation, parse_record
from llava_sp.data.mixture import Source
from llava_sp.data.skipped import SampleReport
from llava_sp.data.sources import open_records
from llava_sp.model.conversation import get_template
from llava_sp.model.processing_llava_sp import IGNORE_INDEX, LlavaSPProcessor

if TYPE_CHECKING:
    from llava_sp.data.features import PatchFeatures

MAX_SKIPS = 1000  # bad samples in a row after which `skip` raises too


@dataclass(frozen=True)
class Encoded:
    """A record's tokens at their final length. `uncut` is the length before the text was cut to the limit."""

    input_ids: list[int]
    labels: list[int]
    uncut: int


class ConversationDataset(Dataset):
    """Samples of a mixture, in the order of the files.

    Args:
        sources: see `mixture.load_mixture`.
        processor: turns text and images into ids and pixels.
        conversation_template: key of `conversation.TEMPLATES`; `None` is the processor's own.
        model_max_length: tokens, image tokens included.
        on_bad_sample: `"fail"` or `"skip"`.
        skipped_path: JSONL file that lists what was skipped or cut; needed to skip.
        seed: draws the part of a source whose weight is not a whole number.

    `dataset[i]` is `{"input_ids": [L], "labels": [L], "pixel_values": [n, 3, H, W] if it has images}`; with `features`,
    every sample has `"patch_features": [n, N, C]` instead, n = 0 without images.

    Raises:
        ValueError: from the constructor for unreadable files and unknown names; from `dataset[i]` for a bad sample.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: LlavaSPProcessor,
        conversation_template: str | None = None,
        model_max_length: int = 2048,
        on_bad_sample: str = "fail",
        skipped_path: str | Path | None = None,
        seed: int = 0,
    ):
        expect(on_bad_sample, one_of("fail", "skip"), "on_bad_sample")
        if on_bad_sample == "skip" and skipped_path is None:
            raise ValueError("on_bad_sample is 'skip', so skipped_path must name the file that lists what was skipped")
        get_template(conversation_template or processor.conversation_template)
        self.processor, self.conversation_template = processor, conversation_template
        self.model_max_length = model_max_length
        self.on_bad_sample = on_bad_sample
        self.sources = expect(list(sources), some(), "sources")
        self.files = [open_records(source) for source in self.sources]
        self.features: PatchFeatures | None = None  # of the images, read instead of them
        self.report = SampleReport(skipped_path)
        self._table = _table(self.sources, [len(file) for file in self.files], seed)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):  # also ends iteration
            raise IndexError(f"sample {index} of {len(self)}")
        tries, reason = min(MAX_SKIPS, len(self)), ""
        for offset in range(tries):
            sample, why = self.sample_or_reason((index + offset) % len(self))
            if sample is not None:
                return sample
            reason = reason or why
        every = " (which is every one)" if tries == len(self) else ""
        bad = f"{counted(tries, 'bad sample')} in a row from {self.where(index)} on{every}"
        raise BadSample(f"{bad}; {self.report.path} lists them. The first: {reason}")

    def sample_or_reason(self, index: int) -> tuple[dict[str, torch.Tensor] | None, str]:
        """`(sample, "")`, or None and why it is skipped, which is listed. Raises `BadSample` if bad samples are not skipped."""
        try:
            return self._sample(index), ""
        except BadSample as error:
            self.skip(index, str(error))
            return None, str(error)

    def skip(self, index: int, reason: str) -> None:
        """List sample `index` as skipped. Raises `BadSample` if bad samples are not skipped."""
        if self.on_bad_sample == "fail":
            raise BadSample(f"{self.where(index)}: {reason}")
        self.report.add("skipped", *self.origin(index), reason=reason)

    def _sample(self, index: int) -> dict[str, torch.Tensor]:
        conversation = self.conversation(index)
        encoded = self.encode(conversation)
        sample = {
            "input_ids": torch.tensor(encoded.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoded.labels, dtype=torch.long),
        }
        if self.features is not None:
            sample["patch_features"] = self.features.read(int(self._table[index][0]), conversation.images)
        elif images := self.load_images(index, conversation):
            sample["pixel_values"] = self.processor.preprocess_images(images)
        if encoded.uncut > len(encoded.input_ids):
            self.report.add("cut", *self.origin(index), tokens=encoded.uncut, limit=self.model_max_length)
        return sample

    def conversation(self, index: int) -> Conversation:
        """The checked record behind sample `index`. Raises `BadSample`."""
        source, record = self._table[index]
        return parse_record(self.files[source][int(record)])

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels, cut to `model_max_length` behind the last image.

        Raises:
            BadSample: the conversation is ill-formed, marks and images differ in number, an image would be cut, or
                nothing is left to learn.
        """
        try:
            ids, labels = self.processor.encode_conversation(
                conversation.turns, self.conversation_template, images=bool(conversation.images)
            )
        except ValueError as error:
            raise BadSample(str(error)) from error
        placeholder, per_image = self.processor.image_token_id, self.processor.num_image_tokens
        marks, images = ids.count(placeholder) // per_image, len(conversation.images)
        if marks != images:
            mark = self.processor.image_token
            raise BadSample(
                f"{counted(marks, f'{mark} mark')} in the text, but {counted(images, 'image')} in the record"
            )
        limit = self.model_max_length
        needed = len(ids) - ids[::-1].index(placeholder) if marks else 0
        if needed > limit:
            raise BadSample(f"its last image ends at token {needed}, but model_max_length is {limit}")
        uncut = len(ids)
        ids, labels = ids[:limit], labels[:limit]
        cut = f", cut from {uncut} to {limit} tokens," if uncut > limit else ""
        if all(label == IGNORE_INDEX for label in labels):
            raise BadSample(f"nothing to learn: the conversation{cut} holds no answer")
        return Encoded(ids, labels, uncut)

    def load_images(self, index: int, conversation: Conversation) -> list[Image.Image]:
        """The decoded images of sample `index`, in the order of the marks. Raises `BadSample`."""
        records = self.files[self._table[index][0]]
        return [records.image(name) for name in conversation.images]

    def look_at_images(self, index: int, conversation: Conversation) -> None:
        """Raises `BadSample` unless the images of sample `index` are there and begin as images; nothing is decoded."""
        records = self.files[self._table[index][0]]
        for name in conversation.images:
            records.look_at_image(name)

    def first_good(self, tries: int = 100) -> dict[str, torch.Tensor] | None:
        """The first good sample with an image, else the first good one; None if the first `tries` of each are bad."""
        with_image = np.array(self.modality_lengths) > 0
        for places in (np.flatnonzero(with_image), np.flatnonzero(~with_image)):
            for place in places[:tries]:
                try:
                    return self._sample(int(place))
                except BadSample:
                    continue
        return None

    def largest(self, number: int) -> list[dict[str, torch.Tensor]]:
        """The good samples with most tokens by estimate, at most `number`. If none of them has images, the sample with most takes
        the place of the last, so that they have all that a batch may hold."""
        lengths, words = np.array(self.lengths), np.abs(self.modality_lengths)
        found: list[dict[str, torch.Tensor]] = []
        for order in (np.argsort(-lengths, kind="stable"), np.argsort(words - lengths, kind="stable")):
            for place in order[: 4 * number].tolist():
                if len(found) == number:
                    break
                with contextlib.suppress(BadSample):
                    found.append(self._sample(place))
            images = (sample[key] for sample in found for key in ("pixel_values", "patch_features") if key in sample)
            if any(map(len, images)) or not (lengths > words).any():
                break
            found = found[:-1]
        return found

    def where(self, index: int) -> str:
        """File and record of sample `index`, for messages."""
        file, record = self.origin(index)
        return f"{file}, record {record}"

    def places(self, chosen: np.ndarray) -> list[tuple[int, int, int]]:
        """`(sample, source, record)` of the samples for which `chosen` is true."""
        samples = np.flatnonzero(chosen)
        return [(index, *row) for index, row in zip(samples.tolist(), self._table[samples].tolist())]

    def origin(self, index: int) -> tuple[str, int]:
        source, record = self._table[index]
        return str(self.files[source].path), int(record)

    @property
    def lengths(self) -> list[int]:
        """Estimated tokens of each sample: words, counted as in LLaVA, plus image tokens; `data.lengths` has the exact ones."""
        words = self.per_sample([file.words for file in self.files])
        images = self.per_sample([file.image_counts for file in self.files])
        return np.maximum(words + images * self.processor.num_image_tokens, 1).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's: words, negative for a sample without images. For `ModalityLengthSampler`."""
        words = np.maximum(self.per_sample([file.words for file in self.files]), 1)
        images = self.per_sample([file.image_counts for file in self.files])
        return np.where(images > 0, words, -words).tolist()

    def per_sample(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """A column of each file, [records], as one of all samples."""
        starts = np.cumsum([0] + [len(column) for column in columns[:-1]])
        return np.concatenate(columns)[starts[self._table[:, 0]] + self._table[:, 1]].astype(np.int64)

    def distinct(self) -> ConversationDataset:
        """The same dataset with each record once, regardless of its weight."""
        return self._with_table(np.unique(self._table, axis=0))

    def whole_file(self, source: int) -> ConversationDataset:
        """Every record of one source's file once."""
        records = np.arange(len(self.files[source]))
        return self._with_table(np.stack([np.full_like(records, source), records], axis=1))

    def split(self, fraction: float, seed: int = 0) -> tuple[ConversationDataset, ConversationDataset]:
        """(training, validation): `fraction` of the records is kept for validation, each record on one side only.

        Raises:
            ValueError: `fraction` is not between 0 and 1, or leaves one side empty.
        """
        records = self.distinct()._table
        kept = round(len(records) * fraction)
        if not 0 < kept < len(records):
            raise ValueError(
                f"a validation fraction of {fraction} of {counted(len(records), 'record')} leaves one side empty"
            )
        chosen = records[np.sort(np.random.default_rng(seed).permutation(len(records))[:kept])]
        validation = {tuple(row) for row in chosen.tolist()}
        held_out = np.array([tuple(row) in validation for row in self._table.tolist()])
        return self._with_table(self._table[~held_out]), self._with_table(chosen)

    def _with_table(self, table: np.ndarray) -> ConversationDataset:
        other = copy.copy(self)
        other._table = table
        return other

    def close_report(self) -> dict[str, int | str | None]:
        """`{"skipped", "cut", "file"}`: distinct records so far, of all processes and workers that share the file."""
        return {**self.report.counts(), "file": None if self.report.path is None else str(self.report.path)}


def _table(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> np.ndarray:
    """[samples, 2]: source and record of each sample of an epoch."""
    parts = []
    for place, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        whole, share = divmod(source.weight, 1)
        drawn = np.random.default_rng([seed, place]).permutation(size)[: round(size * share)]
        records = np.concatenate([np.tile(np.arange(size), int(whole)), np.sort(drawn)])
        parts.append(np.stack([np.full(len(records), place), records], axis=1))
    table = np.concatenate(parts)
    if not len(table):
        raise ValueError("the weights leave no samples")
    return table
