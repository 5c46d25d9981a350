"""The tiny Llama of the shapes world: a LlamaForCausalLM with its own SentencePiece tokenizer, in Vicuna's files.

Its text is the world's: captions, and conversations in Vicuna's format about scenes that are *described in words*. So it
can answer from what stands before, count and compare places, and was trained on no image: what Vicuna is to LLaVA. A
large language model can read many words at one position, which is what an image token is; this one is too small to
learn that by itself, so some descriptions are `Chords`, several words' embeddings added up.
Run by `python -m llava_sp.shapes.train_backbones`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from llava_sp.shapes.language import CAPTION_REQUESTS, SUFFIX, Interviewer, all_words, caption, description
from llava_sp.shapes.world import GRID, Scene, sample_scene

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VOCABULARY = 704
LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.06,
}
UNKNOWN, BOS, EOS = 0, 1, 2
QUESTIONS_PER_TEXT = 6

FILLER = "."  # a chord for an empty position
Chords = list[str]  # the words of each string share one position
Segments = list[tuple[str | Chords, bool]]  # (text, is it the assistant's?); an assistant's segment ends a turn


@dataclass
class Sample:
    """A text as a model's input: ids, the weight of each as a target, and position -> the ids that share it."""

    ids: list[int]
    weights: list[float]
    chords: dict[int, list[int]]


@dataclass(frozen=True)
class Cycle:
    """One cycle of training: its steps, its highest rate, the share of texts that are only to be repeated, that of
    captions (the rest are conversations), which stand alone or behind a description, and that of descriptions in chords."""

    steps: int
    rate: float
    repeated: float
    captions: float = 0.125
    described: bool = False
    in_chords: float = 0.0


# First it learns to read back what stands before it, then mostly to answer, then also to caption what stands before it, which
# the first stage of LLaVA's training asks of a language model that does not learn any more.
CYCLES = (
    Cycle(2500, 2e-3, 0.2),
    Cycle(2000, 1.5e-3, 0.05, in_chords=0.5),
    Cycle(900, 1.5e-3, 0.05, captions=0.35, described=True, in_chords=0.7),
)


def in_chords(scene: Scene, rng: np.random.Generator) -> Chords:
    """The scene line by line, as an image's patches show it: a thing's name and place at each of its positions."""
    chords: Chords = []
    for row in range(GRID):
        things = [thing for thing in scene.things if thing.row == row]
        for _ in range(rng.integers(1, 4)):
            for thing in things:
                chords += [FILLER] * rng.integers(4) + [f"{thing.label} {thing.place}"] * rng.integers(1, 4)
            chords += [FILLER] * rng.integers(4)
    return chords


def document(rng: np.random.Generator, interviewer: Interviewer, cycle: Cycle) -> Segments:
    """One training text: words to repeat, a caption alone, or a conversation about a scene described in words, some
    of them behind Vicuna's system sentence."""
    if rng.random() < cycle.repeated:
        words = " ".join(rng.choice(all_words(), size=rng.integers(6, 25)))
        return [(f"USER: {words}\nSay it again. ASSISTANT:", False), (words, True)]
    scene, kind = sample_scene(rng, "train"), rng.random()
    described = in_chords(scene, rng) if rng.random() < cycle.in_chords else description(scene, rng)
    if kind < cycle.captions:
        return [*([(described, False)] if cycle.described else []), (caption(scene), True)]
    opening = f"{SYSTEM} USER: " if rng.random() < 0.3 else "USER: "
    before: Segments = [(opening, False), (described, False)]
    if isinstance(described, str):
        before = [(opening + described, False)]
    if kind < cycle.captions + 0.125:
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        return [*_joined(before, f"\n{request} ASSISTANT:"), (caption(scene), True)]
    segments: Segments = []
    for question in interviewer.interview(scene, QUESTIONS_PER_TEXT):
        if segments:
            segments.append((f"USER: {question.text} ASSISTANT:", False))
        else:
            segments += _joined(before, f"\n{question.text}{SUFFIX} ASSISTANT:")
        segments.append((question.answer, True))
    return segments


def _joined(before: Segments, text: str) -> Segments:
    """The text behind what stands before it: one text with a text, on its own behind chords."""
    *first, (last, _) = before
    return [*first, (last + text, False)] if isinstance(last, str) else [*before, (text, False)]


def train_tokenizer(texts: list[str], path: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece BPE like Llama's (byte fallback, digits apart); written to `path`/tokenizer.model."""
    path.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars="".join(chr(c) for c in range(33, 127)),
        num_threads=1,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    save_tokenizer_files(path)
    return AutoTokenizer.from_pretrained(path)


def encode(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> Sample:
    """The assistant's words and end token weigh 1 as targets, everything else 0.1, chords 0.

    A turn after the first comes directly after "</s>", where Llama's tokenizer puts no space in front of "USER".
    """
    sample = Sample([BOS], [0.0], {})
    for text, is_answer in segments:
        if isinstance(text, list):
            for words in text:
                sample.chords[len(sample.ids)] = tokenizer(words, add_special_tokens=False).input_ids
                sample.ids.append(UNKNOWN)
                sample.weights.append(0.0)
            continue
        after_end = sample.ids[-1] == EOS
        piece = tokenizer(f"</s>{text}" if after_end else text, add_special_tokens=False).input_ids[after_end:]
        piece += [EOS] if is_answer else []
        sample.ids += piece
        sample.weights += [1.0 if is_answer else 0.1] * len(piece)
    return sample


def embed(model: LlamaForCausalLM, ids: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    """Input embeddings [B, L, D] of padded ids [B, L]: at a chord's position the sum of its words'."""
    table = model.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    places = [(row, position) for row, sample in enumerate(samples) for position in sample.chords]
    if not places:
        return table(ids)
    groups = [sample.chords[position] for sample in samples for position in sample.chords]
    starts = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)[:-1]
    words = torch.tensor([number for group in groups for number in group])
    sums = F.embedding_bag(words, table.weight, starts, mode="sum")
    rows, positions = torch.tensor(places).T
    return table(ids).index_put((rows, positions), sums)


def batch_loss(model: LlamaForCausalLM, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted token loss of a right-padded batch, and the accuracy over the assistant's tokens."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([sample.ids + [0] * (length - len(sample.ids)) for sample in samples])
    weights = torch.tensor([sample.weights + [0.0] * (length - len(sample.weights)) for sample in samples])[:, 1:]
    logits = model(inputs_embeds=embed(model, ids, samples)).logits[:, :-1]
    per_token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    answers = weights == 1.0
    accuracy = (logits.argmax(-1) == ids[:, 1:])[answers].float().mean()
    return (per_token * weights.flatten()).sum() / weights.sum(), accuracy


def start(seed: int, path: Path) -> LlamaForCausalLM:
    """A fresh model, and its tokenizer trained and written to `path`."""
    rng = np.random.default_rng([seed, 3])
    interviewer = Interviewer(rng)
    torch.manual_seed(seed)
    documents = [document(rng, interviewer, CYCLES[0]) for _ in range(3000)]
    corpus = [text for segments in documents for text, _ in segments if isinstance(text, str)]  # no chords yet
    tokenizer = train_tokenizer(corpus, path)
    special: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **special, vocab_size=len(tokenizer), tie_word_embeddings=False))


def train(model: LlamaForCausalLM, path: Path, seed: int, number: int, steps: int, batch_size: int, log=print) -> dict:
    """Cycle `number` of the training, with the tokenizer in `path`; returns figures of fresh texts."""
    cycle = CYCLES[number]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rng = np.random.default_rng([seed, 3, number])
    interviewer = Interviewer(rng)

    def batch(size: int) -> list[Sample]:
        return [encode(tokenizer, document(rng, interviewer, cycle)) for _ in range(size)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=cycle.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cycle.rate, total_steps=steps, pct_start=0.05)
    started = time.time()
    for step in range(steps):
        loss, accuracy = batch_loss(model, batch(batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            log(
                f"llama cycle {number} step {step:4d}/{steps}  loss {loss.item():.3f}  "
                f"answer tokens right {accuracy.item():.3f}  {time.time() - started:.0f} s"
            )
    with torch.no_grad():
        rows = [batch_loss(model, batch(32)) for _ in range(4)]
    means = [round(float(torch.stack(column).mean()), 4) for column in zip(*rows)]
    return {"loss": means[0], "answer tokens right": means[1], "seconds": round(time.time() - started)}


def load(path: Path) -> LlamaForCausalLM:
    """What `save` wrote, ready to be trained on."""
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).train()


def save(model: LlamaForCausalLM, path: Path) -> None:
    """Write 16-bit weights beside the tokenizer."""
    model.half().save_pretrained(path)


def save_tokenizer_files(path: Path) -> None:
    """Vicuna's small tokenizer files beside tokenizer.model."""

    def special(content: str) -> dict:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        return {"__type": "AddedToken", "content": content, **flags}

    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": special("</s>"),
        "legacy": False,
        "model_max_length": LLAMA["max_position_embeddings"],
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": special("<unk>"),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    (path / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
