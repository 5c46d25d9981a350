"""Conversation templates: turns -> segments `(text, is it learned?)`, and the Jinja template that renders the same text.

One definition per template serves training (segments), inference (`apply_chat_template`) and the saved checkpoint.
To add a template, add one entry to `TEMPLATES`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

IMAGE_MARK = "<image>"

Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Segment = tuple[str, bool]  # (text, whether its tokens are learned)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """How turns become text.

    `{bos}` and `{eos}` stand for the tokenizer's own tokens, `{system}` for the system text. A whole conversation reads

        opening + system_text + first_user + QUESTION + after_user + before_answer + [answer_start + ANSWER + answer_end]
        + user + QUESTION + ...

    where the part in brackets is learned. An empty answer renders as `before_answer` alone, nothing learned, as in the
    original. `images_only` keeps only the image marks of a question (captioning, LLaVA's first stage).
    `own_chat_template` means that the tokenizer's own Jinja template renders the text.
    """

    system: str = ""
    opening: str = ""
    system_text: str = ""
    first_user: str = ""
    user: str = ""
    after_user: str = ""
    before_answer: str = ""
    answer_start: str = ""
    answer_end: str = ""
    images_only: bool = False
    own_chat_template: bool = False


_VICUNA_V1 = Template(
    system=VICUNA_SYSTEM,
    system_text="{system} ",
    first_user="USER: ",
    user="USER: ",
    after_user=" ",
    before_answer="ASSISTANT:",
    answer_start=" ",  # the space before the first word belongs to that word's token
    answer_end="{eos}",
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _VICUNA_V1,
    "llava_v1": replace(_VICUNA_V1, system=VICUNA_SYSTEM.replace("user", "human")),
    "llama_2": Template(
        system=LLAMA_2_SYSTEM,
        opening="[INST] ",
        system_text="<<SYS>>\n{system}\n<</SYS>>\n\n",
        user="{bos}[INST] ",
        after_user=" [/INST]",
        answer_start=" ",
        answer_end=" {eos}",
    ),
    "plain": Template(answer_end="\n", images_only=True),
    "chatml": Template(own_chat_template=True),
}


def get_template(name: str) -> Template:
    """The template called `name`; `ValueError` lists those that exist."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown conversation template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def words_of(conversation: list) -> str:
    """The user's text in one conversation or several, without the image marks."""
    turns = [turn for one in conversation for turn in (one if isinstance(one, list) else [one])]
    contents = [turn.get("content") or "" for turn in turns if turn.get("role") == "user"]
    texts = [[item.get("text") or "" for item in c] if isinstance(c, list) else [c] for c in contents]
    return " ".join(" ".join(map(" ".join, texts)).replace(IMAGE_MARK, " ").split())


def normalize_turns(turns: list[Turn], images: bool = True) -> list[Turn]:
    """Checked turns: an optional system turn, then user and assistant in alternation, the user first.

    As in LLaVA, an assistant turn that opens the conversation is dropped, and the single image mark of a turn moves to
    the front of it, followed by a newline. Several marks in one turn keep their positions (the original merges them), and so
    do all marks of a conversation without `images`, where they are text.

    Raises:
        ValueError: no turns, a role that is unknown or out of order, content that is not text.
    """
    roles = [turn.get("role") for turn in turns]
    system = int(roles[:1] == ["system"])
    first = system + int(roles[system : system + 1] == ["assistant"])
    if first == len(turns):
        raise ValueError(f"the conversation has no user turn; its roles are {roles}")
    for position, turn in enumerate(turns):
        expected = roles[position] if position < first else ("user", "assistant")[(position - first) % 2]
        content = turn.get("content")
        if roles[position] != expected or not isinstance(content, str):
            found = f"by the {roles[position]} with {content!r:.80}"
            raise ValueError(f"turn {position} is {found}; it must be text by the {expected}")
    place = _mark_first if images else str
    return turns[:system] + [{"role": turn["role"], "content": place(turn["content"])} for turn in turns[first:]]


def _mark_first(content: str) -> str:
    if content.count(IMAGE_MARK) != 1:
        return content
    return f"{IMAGE_MARK}\n{content.replace(IMAGE_MARK, '').strip()}".strip()


def render_segments(
    turns: list[Turn], template: Template, bos: str = "", eos: str = "", images: bool = True
) -> list[Segment]:
    """Segments of a conversation that went through `normalize_turns`; their texts joined are the whole text.

    Raises:
        ValueError: an `images_only` template with other turns than one with an image and one answer.
    """
    assert not template.own_chat_template, "rendered by the tokenizer, see LlavaSPProcessor.render_conversation"

    def fill(text: str) -> str:
        return text.replace("{bos}", bos).replace("{eos}", eos)

    system = template.system
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if template.images_only and (len(turns) != 2 or not images or IMAGE_MARK not in turns[0]["content"]):
        marks = [turn["content"].count(IMAGE_MARK) if images else 0 for turn in turns]
        raise ValueError(f"the plain template needs a turn with {IMAGE_MARK} and a caption; marks per turn are {marks}")
    segments = [(fill(template.opening), False)]
    if system and template.system_text:
        segments.append((template.system_text.replace("{system}", system), False))
    for index, turn in enumerate(turns):
        content = turn["content"]
        if turn["role"] == "user":
            if template.images_only:
                content = IMAGE_MARK * content.count(IMAGE_MARK)
            before = template.user if index else template.first_user
            segments.append((fill(before) + content + fill(template.after_user), False))
            continue
        segments.append((fill(template.before_answer), False))
        if content or template.images_only:
            segments.append((fill(template.answer_start) + content + fill(template.answer_end), True))
    return [segment for segment in segments if segment[0]]


# Turns content given as a list of {"type": "image"} and {"type": "text"} items into text with image marks: one goes
# first, as in LLaVA's evaluation; several keep their positions. Text is unchanged.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set images = message.content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set part = namespace(text=MARK if images == 1 else '') -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}
{%- if images > 1 -%}{%- set part.text = part.text + MARK -%}{%- endif -%}
{%- elif item.type == 'text' -%}
{%- set part.text = part.text + item.text -%}
{%- else -%}
{{- raise_exception('content of type ' ~ item.type ~ ' is not supported; use image and text') -}}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=part.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".replace("MARK", json.dumps(IMAGE_MARK + "\n"))

# `@name@` is replaced by a Jinja expression made from the template's field of that name.
_TURNS = """\
{%- set system = @system@ -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- @opening@ -}}
{%- if system -%}{{- @system_text@ -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' and loop.index0 is even -%}
{{- @first_user@ if loop.first else @user@ -}}{{- @question@ -}}{{- @after_user@ -}}
{%- elif message.role == 'assistant' and loop.index0 is odd -%}
{{- @before_answer@ -}}
{%- if message.content -%}
{%- generation -%}{{- @answer_start@ + message.content + @answer_end@ -}}{%- endgeneration -%}
{%- endif -%}
{%- else -%}
{{- raise_exception('turn ' ~ loop.index0 ~ ' is by ' ~ message.role ~ '; user and assistant alternate, the user first') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @before_answer@ -}}{%- endif -%}
"""


def _jinja_text(text: str) -> str:
    """A Jinja expression for `text`, with its `{bos}`, `{eos}` and `{system}` as variables."""
    expression = json.dumps(text)
    for name, variable in (("{bos}", "bos_token"), ("{eos}", "eos_token"), ("{system}", "system")):
        expression = expression.replace(name, f'" + {variable} + "')
    return f"({expression})"


def jinja_template(template: Template, own: str | None = None) -> str:
    """The Jinja chat template of `template`. `own` is the tokenizer's, wrapped when the template builds on it.

    Raises:
        ValueError: the template needs the tokenizer's own, and `own` is empty.
    """
    if template.own_chat_template:
        if not own:
            others = ", ".join(name for name, other in TEMPLATES.items() if not other.own_chat_template)
            raise ValueError(f"'chatml' needs a tokenizer with a chat template of its own; use one of {others}")
        return _FLATTEN + own
    mark = json.dumps(IMAGE_MARK)
    question = f"({mark} * (message.content.split({mark}) | length - 1))" if template.images_only else "message.content"

    def expression(match: re.Match) -> str:
        name = match.group(1)
        return question if name == "question" else _jinja_text(getattr(template, name))

    return _FLATTEN + re.sub("@([a-z_]+)@", expression, _TURNS)
