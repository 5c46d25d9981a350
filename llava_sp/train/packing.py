"""A run with packs: their plan from exact lengths, and the proof that the model keeps their samples apart."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from llava_sp.common.files import counted
from llava_sp.common.processes import FailedHere, Processes
from llava_sp.config.arguments import Run
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.lengths import measure
from llava_sp.data.packing import Packs, PackSampler
from llava_sp.train.processes import accumulate, samples_per_step

logger = logging.getLogger(__name__)


def plan_packs(run: Run, dataset: ConversationDataset, here: Processes) -> PackSampler:
    """The packs of a run, the same on all processes; also sets how many each process accumulates.

    The main process measures the lengths, and lists bad records where these are skipped.

    Raises:
        BadSample: a record is bad, and `on_bad_sample` is "fail".
        ValueError: `pack_length` is below the longest sample; no record is good.
    """
    args, longest_pack = run.train, run.data.longest_pack
    table = np.zeros((2, 0), dtype=int)
    with here.together():
        if here.is_main:
            table = _tokens_and_images(dataset, Path(str(args.output_dir)))
            _check_longest(run, dataset, table[0])
    tokens, images = here.from_main(table)
    per_step = samples_per_step(args)
    epochs = math.ceil(np.count_nonzero(tokens) / per_step)
    packs = PackSampler(
        tokens,
        images,
        samples_per_step=per_step,
        pack_length=longest_pack,
        processes=args.world_size,
        seed=args.data_seed or 0,
        steps=args.max_steps if args.max_steps > 0 else math.ceil(epochs * args.num_train_epochs),
    )
    accumulate(args, packs.packs_per_step // args.world_size)
    return packs


def _tokens_and_images(dataset: ConversationDataset, output_dir: Path) -> np.ndarray:
    """[2, samples]; 0 tokens for a bad sample. Raises `BadSample`, `ValueError`."""
    files = measure(dataset, workers=min(16, os.cpu_count() or 1), spare=output_dir)
    table = np.stack(
        [dataset.per_sample([file.tokens for file in files]), dataset.per_sample([f.images for f in files])]
    )
    bad = dataset.places(table[0] == 0)
    for index, source, record in bad:
        dataset.skip(index, files[source].reasons[record])
    if len(bad) == len(dataset):
        raise ValueError(f"{counted(len(bad), 'bad sample')}, and no other; {dataset.report.path} lists them")
    return table


def _check_longest(run: Run, dataset: ConversationDataset, tokens: np.ndarray) -> None:
    data, index = run.data, int(tokens.argmax())
    longest, room = int(tokens[index]), data.longest_pack
    if longest > room:
        key = f"pack_length = {data.pack_length}" if data.pack_length else f"pack_length is not set: {room}"
        least = longest + -longest % data.pad_to_multiple_of
        raise ValueError(
            f"{key}, but {dataset.where(index)} has {longest} tokens, the most of all: give a pack_length of {least} or more, "
            f"or a model_max_length (now {data.model_max_length}) that is less"
        )


def rows_of(
    dataset: ConversationDataset, packs: PackSampler | None, batch: int
) -> tuple[ConversationDataset | Packs, list[Any]]:
    """What the trainer reads, and the samples, or the pack, of the largest batch of at most `batch` rows."""
    if packs is None:
        return dataset, dataset.largest(batch)
    rows = Packs(dataset)
    return rows, [rows[packs.largest()]]


def describe(packs: PackSampler, multiple: int) -> str:
    """The packs in a line, for the log."""
    found, per_process = packs.summary(multiple), packs.packs_per_step // packs.processes
    samples = len(packs.samples) / packs.steps_per_epoch
    return (
        f"Packing: {samples:,.1f} samples and {found.tokens * packs.packs_per_step:,.0f} tokens per step on average, in "
        f"{packs.packs_per_step} packs per step = {packs.processes} processes x {per_process} accumulated, {found.tokens:,.0f} "
        f"tokens each (the longest {found.longest:,} of {packs.pack_length:,}), {found.padding:.2%} padding; "
        f"processes wait {found.waiting:.1%} of the time for the slowest."
    )


class KeptApart(TrainerCallback):
    """Before the first step: changing one sample of a pack must not change the next one, in this model as it will train."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model
        language = model.model.language_model
        first, last = torch.arange(3, 19), torch.arange(30, 38)
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(last))])
        model.eval()
        seen = []
        for changed in (first, first + 20):
            ids = torch.cat([changed, last]) % model.config.image_token_id
            inputs = {"input_ids": ids[None].to(args.device), "position_ids": positions[None].to(args.device)}
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                states = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
            seen.append(states[0, len(first) :].float())
        change = (seen[0] - seen[1]).abs().max() / seen[0].abs().max()
        if not change < 1e-3:
            raise FailedHere(
                f"packing is true, but {type(language).__name__} does not keep the samples of a pack apart with "
                f"attn_implementation {language.config._attn_implementation!r} (a sample changes the next one by {change:.2g}): "
                "set another one, or packing to false"
            )
