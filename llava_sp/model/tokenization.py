"""Tokenization as in the original: the added tokens, and SentencePiece's rule for spaces in a fast tokenizer."""

from __future__ import annotations

import json
import re
from functools import cached_property

import transformers
from tokenizers import Tokenizer

from .conversation import IMAGE_MARK


def add_special_tokens(tokenizer, base_rows: int = 0) -> tuple[int, int, int]:
    """Add `<image>` and, where the tokenizer lacks a padding token of its own, `<pad>`; existing ones stay.

    Args:
        tokenizer: changed in place. A padding token that is also unk, bos or eos counts as missing: padding must never
            be learned nor generated.
        base_rows: rows of the base model's embedding.

    Returns:
        `(image_token_id, pad_token_id, rows)`; `rows` is the embedding's new size: a multiple of 64, or `base_rows` if
        that suffices. For Vicuna: 32000, 32001, 32064.
    """
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([transformers.AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        pad = transformers.AddedToken("<pad>", special=True, normalized=False)
        tokenizer.add_special_tokens({"pad_token": pad})
    rows = max(len(tokenizer), base_rows)
    if rows > base_rows:
        rows = -(-rows // 64) * 64
    return tokenizer.convert_tokens_to_ids(IMAGE_MARK), tokenizer.pad_token_id, rows


class TextEncoder:
    """Texts -> ids with their positions, as the original's slow tokenizer splits them. Image marks are cut out before.

    SentencePiece puts its word-start piece before a text even if that begins with a space ("▁▁", "and"); the fast
    tokenizer built from the same file leaves it out there ("▁and"). The original tokenizes with the former, and every text
    after an image that does not start on a new line is such a text. With a `legacy` tokenizer, so is every text after a
    special token. There the space is doubled here.

    Attributes:
        prefix: the ids that the tokenizer puts before a text (the beginning-of-sequence token, or nothing).
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        alone, whole = self._ids("a"), tokenizer("a")["input_ids"]
        starts = [start for start in range(len(whole)) if alone and whole[start : start + len(alone)] == alone]
        self.prefix = whole[: starts[0]] if starts else []
        self.traps = [re.compile(r"\A[ ▁]")] if self._drops_space("") else []
        if tokenizer.eos_token and self._drops_space(tokenizer.eos_token):
            special = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
            self.traps.append(re.compile(f"(?:{special})[ ▁]"))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _drops_space(self, before: str) -> bool:
        alone, spaced = self._ids(f"{before}a"), self._ids(f"{before} a")
        starts = self.tokenizer.convert_ids_to_tokens(alone)[1 if before else 0 :]
        return alone == spaced and bool(starts) and starts[0].startswith("▁")

    @cached_property
    def _spelling(self) -> Tokenizer:
        """The tokenizer as it was before `<image>` was added to it."""
        settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
        settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] != IMAGE_MARK]
        return Tokenizer.from_str(json.dumps(settings | {"padding": None, "truncation": None}))

    def encode(self, text: str, spell: bool = False) -> list[tuple[int, int, int]]:
        """`(id, first character, character after the last)` of each token; `spell` encodes image marks as text.

        Raises `ValueError` for half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair in {text[: error.end][-30:]!r}: not text") from None
        doubled = sorted({match.end() - 1 for trap in self.traps for match in trap.finditer(text)})
        for position in reversed(doubled):
            text = text[:position] + " " + text[position:]
        if spell and IMAGE_MARK in text:
            spelled = self._spelling.encode(text, add_special_tokens=False)
            ids, places = spelled.ids, spelled.offsets
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, places = encoded["input_ids"], encoded["offset_mapping"]
        if not doubled:
            return [(token, first, last) for token, (first, last) in zip(ids, places, strict=True)]
        inserted = [position + index for index, position in enumerate(doubled)]

        def original(position: int) -> int:
            return position - sum(place < position for place in inserted)

        return [(token, original(first), original(last)) for token, (first, last) in zip(ids, places, strict=True)]
