"""What the model generates: alone or in a batch, with beams, streamed, compiled, and never an id that is not a word."""

from __future__ import annotations

import pytest
import torch

from llava_sp import LlavaSPForCausalLM

PROMPTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: Hi ASSISTANT:",
    "USER: <image>\n<image>\nWhich one is older, the first or the second picture? ASSISTANT:",
]


def new_tokens(model, inputs, **settings) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=8, **settings)[:, inputs["input_ids"].shape[1] :]


def test_a_left_padded_batch_answers_as_each_prompt_alone(model, processor, images):
    batch = new_tokens(model, processor(text=PROMPTS, images=images, padding=True))
    for row, (prompt, own) in enumerate(zip(PROMPTS, [images[:1], None, images[1:]])):
        alone = new_tokens(model, processor(text=prompt, images=own))[0]
        assert batch[row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
        {"do_sample": True, "temperature": 50.0, "top_k": 0},
    ],
)
def test_generation_modes_never_make_placeholders(model, processor, images, settings):
    torch.manual_seed(0)
    tokens = new_tokens(model, processor(text=PROMPTS, images=images, padding=True), **settings)
    assert tokens.shape[0] == 3 * settings.get("num_return_sequences", 1)
    unused = [token for token in tokens.flatten().tolist() if token >= 1000]
    # Rows that have ended are filled with padding; nothing else of the added ids may appear.
    assert all(token == processor.pad_token_id for token in unused)
    for row in tokens.tolist():
        assert processor.pad_token_id not in row or 2 in row[: row.index(processor.pad_token_id)]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_every_beam_sees_the_images_of_its_prompt(model, processor, images, settings):
    """What the decoder is given for the copies of a prompt is what it is given for the prompt itself."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    try:
        inputs = processor(text=PROMPTS, images=images, padding=True)
        new_tokens(model, inputs)
        plain = seen[0]
        seen.clear()
        new_tokens(model, inputs, **settings)
    finally:
        hook.remove()
    copies = settings.get("num_beams", settings.get("num_return_sequences"))
    torch.testing.assert_close(seen[0], plain.repeat_interleave(copies, dim=0))


def test_streaming(model, processor, images):
    from transformers import TextStreamer

    pieces = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    inputs = processor(text=PROMPTS[0], images=images[:1])
    tokens = new_tokens(model, inputs, streamer=Collect(processor.tokenizer, skip_prompt=True))
    assert "".join(pieces) == processor.decode(tokens[0])


def test_a_padding_token_among_the_words_is_not_generated(model, processor, images, monkeypatch):
    """Some tokenizers have a padding token of their own, below the placeholder; unless it ends answers, it is no word."""
    inputs = processor(text=PROMPTS[0], images=images[:1])
    favourite = new_tokens(model, inputs)[0, 0].item()
    monkeypatch.setattr(model.config, "pad_token_id", favourite)
    with torch.no_grad():
        assert model(**inputs).logits[0, -1].argmax() != favourite
        monkeypatch.setattr(model.generation_config, "eos_token_id", [2, favourite])
        assert model(**inputs).logits[0, -1].argmax() == favourite


def test_unused_ids_are_least_likely_everywhere(model, processor, images):
    with torch.no_grad():
        logits = model(**processor(text=PROMPTS[0], images=images[:1])).logits
    assert (logits[..., 1000:] == torch.finfo(torch.float32).min).all()


def test_torch_compile_gives_the_same_logits(model, processor, images):
    inputs = processor(text=PROMPTS[0], images=images[:1])
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16(golden, processor, images):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = processor(text=PROMPTS[0], images=images[:1])
    assert torch.isfinite(model(**inputs).logits).all()
    assert new_tokens(model, inputs).shape[1] <= 8
