"""Conversation templates: turns to segments, and the Jinja templates that must render the same text."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_sp.model.conversation import TEMPLATES, get_template, jinja_template, normalize_turns, render_segments
from tests.messages import refused


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + spoken


def render(conversation, name: str) -> list[tuple[str, bool]]:
    return render_segments(normalize_turns(conversation), get_template(name), "<s>", "</s>")


def jinja(conversation, name: str, **options) -> str:
    rendered, _ = render_jinja_template(
        conversations=[conversation],
        chat_template=jinja_template(TEMPLATES[name]),
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return rendered[0]


def test_vicuna_segments():
    segments = render(turns("<image>\nWhat?", "A cat.", "Sure?", "Yes."), "vicuna_v1")
    assert [text for text, learned in segments if learned] == [" A cat.</s>", " Yes.</s>"]
    text = "".join(text for text, _ in segments)
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert text.endswith("questions. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>")


def test_llama_2_segments():
    segments = render(turns("Hi", "A", "B?", "C", system="Be brief."), "llama_2")
    text = "".join(text for text, _ in segments)
    assert text == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] A </s><s>[INST] B? [/INST] C </s>"
    assert [text for text, learned in segments if learned] == [" A </s>", " C </s>"]


def test_plain_keeps_image_and_caption():
    assert render(turns("<image>\nDescribe it.", "A cat."), "plain") == [("<image>", False), ("A cat.\n", True)]


def test_empty_answer_teaches_nothing():
    assert not any(learned for _, learned in render(turns("Hi", ""), "vicuna_v1"))


@pytest.mark.parametrize(
    "given, expected",
    [
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("Look at <image> and say.", "<image>\nLook at  and say."),
        ("<image>", "<image>"),
        ("<image>\n  text \n", "<image>\ntext"),
        ("<image> and <image>?", "<image> and <image>?"),
        ("  no mark ", "  no mark "),
    ],
)
def test_a_single_mark_moves_to_the_front(given, expected):
    assert normalize_turns(turns(given))[0]["content"] == expected


def test_opening_assistant_turn_is_dropped():
    conversation = [{"role": "assistant", "content": "Welcome!"}, *turns("Hi", "Hello")]
    assert normalize_turns(conversation) == turns("Hi", "Hello")


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], r"\[\]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "turn 1 is by the user"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "turn 1 is by the system"),
        ([{"role": "tool", "content": "a"}], "turn 0 is by the tool"),
        ([{"role": "user", "content": 3}], "turn 0 is by the user with 3; .*text"),
        ([{"role": "assistant", "content": "a"}], "no user turn.*'assistant'"),
        ([{"role": "assistant", "content": None}, *turns("a")], "turn 0 is by the assistant with None"),
        ([{"role": "system", "content": "a"}], "no user turn"),
    ],
)
def test_bad_conversations(conversation, message):
    with pytest.raises(ValueError, match=message):
        normalize_turns(conversation)


@pytest.mark.parametrize("conversation", [turns("no mark", "x"), turns("<image>", "x", "more?", "y")])
def test_plain_takes_one_image_turn_and_one_caption(conversation):
    with refused("plain template", "<image>", "marks"):
        render(conversation, "plain")


def test_unknown_template_lists_the_known():
    with pytest.raises(ValueError, match="'vicuna'.*vicuna_v1, llava_v1, llama_2, plain, chatml"):
        get_template("vicuna")


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2"])
@pytest.mark.parametrize(
    "conversation",
    [
        turns("<image>\nWhat?", 'A "quoted" \\n backslash {{ brace }}.\nLine'),
        turns("Hi", "", "USER: still there? ASSISTANT:", "Yes."),
        turns("Hi", "Hello", "And now?"),
        turns("Hi", "Hello", system="Be brief."),
        turns("Hi", "Hello", system=""),
    ],
)
def test_jinja_renders_the_training_text(name, conversation):
    assert jinja(conversation, name) == "".join(text for text, _ in render(conversation, name))


def test_jinja_plain_and_generation_prompt():
    assert jinja(turns("<image>\nDescribe."), "plain", add_generation_prompt=True) == "<image>"
    assert jinja(turns("Hi"), "vicuna_v1", add_generation_prompt=True).endswith(" USER: Hi ASSISTANT:")
    assert jinja(turns("Hi"), "llama_2", add_generation_prompt=True).endswith("<</SYS>>\n\nHi [/INST]")


def test_jinja_content_lists():
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    ask = [{"role": "user", "content": [text, image]}]
    assert jinja(ask, "vicuna_v1").endswith("USER: <image>\nWhat? ")
    several = [{"role": "user", "content": [image, image, text]}]
    assert jinja(several, "vicuna_v1").endswith("USER: <image>\n<image>\nWhat? ")


def test_jinja_refuses_what_it_cannot_render():
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="turn 1 is by user"):
        jinja([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "vicuna_v1")
    with pytest.raises(TemplateError, match="type video is not supported"):
        jinja([{"role": "user", "content": [{"type": "video"}]}], "vicuna_v1")


def test_chatml_needs_the_tokenizers_own_template():
    with pytest.raises(ValueError, match="'chatml' .*vicuna_v1"):
        jinja_template(TEMPLATES["chatml"], None)
