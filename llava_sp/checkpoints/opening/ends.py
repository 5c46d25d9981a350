"""Whether a language model learns to end its answers: the last learned tokens of its template, and its stop tokens."""

from __future__ import annotations

import os

from llava_sp.checkpoints.reading.places import fetch_config
from llava_sp.common.files import read_json
from llava_sp.model.backbone_configs import language_config
from llava_sp.model.conversation import get_template
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

_ANSWER = "Yes."


def never_stops(processor: LlavaSPProcessor, language_model: str | os.PathLike, **hub_kwargs) -> str | None:
    """A warning if the processor's template learns no end-of-sequence id of the language model, else None.

    Captions (`plain`) end with a line break, as in LLaVA: such a model is not used for answers.
    """
    name = processor.conversation_template
    if get_template(name).images_only:
        return None
    turns = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": _ANSWER}]
    segments = processor.render_conversation(turns)
    ends = _end_ids(processor, language_model, **hub_kwargs)
    if not set(ends).isdisjoint(processor.encode_segments(segments)[1]):
        return None
    end = "".join(text for text, learned in segments if learned).rpartition(_ANSWER)[2]
    stops = ", ".join(f"{i} ({processor.tokenizer.convert_ids_to_tokens(i)})" for i in ends)
    return (
        f"the conversation template {name!r} ends an answer with {end!r}, and none of its tokens is an end-of-sequence id of "
        f"{language_model}, which are {stops}: the model never learns to stop. Choose another template, or put the id "
        "of that end into eos_token_id of the language model's generation_config.json"
    )


def _end_ids(processor: LlavaSPProcessor, language_model: str | os.PathLike, **hub_kwargs) -> list[int]:
    """The end-of-sequence ids of this language model."""
    file = fetch_config(language_model, "generation_config.json", **hub_kwargs)
    settings = {} if file is None else read_json(file, {"eos_token_id?": (int, [int], None)})
    ends = language_config(language_model, **hub_kwargs).eos_token_id if file is None else settings.get("eos_token_id")
    ends = processor.tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]
