"""How answers are decoded: the settings, and the arguments of `generate` that they become. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GREEDY = {"temperature": None, "top_p": None, "top_k": None}  # the checkpoint's values too: transformers warns


@dataclass(frozen=True)
class Generation:
    """Settings of `generate`; the defaults are those of LLaVA-1.5's short-answer benchmarks (greedy)."""

    do_sample: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    use_cache: bool = True

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.do_sample else GREEDY
        return {
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": self.use_cache,
            **sampling,
        }
