"""Language models of every kind: on text, the model answers as its base does, or it is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_sp import LlavaSPForCausalLM

WORDS = 1000  # of the golden tokenizer
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "max_seq_len": 128,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type, its own settings, its steps after the head
PLAIN = {"scale": None, "softcap": None, "bias": False}
LANGUAGE_MODELS = [
    ("llama", {}, PLAIN),
    ("mistral", {}, PLAIN),
    ("qwen2", {}, PLAIN),
    ("qwen3", {}, PLAIN),
    ("gemma", {}, PLAIN),
    ("gemma2", {"final_logit_softcapping": 3.0}, PLAIN | {"softcap": 3.0}),
    ("gemma3_text", {}, PLAIN),
    ("gemma3_text", {"final_logit_softcapping": 2.0}, PLAIN | {"softcap": 2.0}),
    ("granite", {"logits_scaling": 6.0, "embedding_multiplier": 12.0}, PLAIN | {"scale": 1 / 6}),
    ("cohere", {"logit_scale": 0.25}, PLAIN | {"scale": 0.25}),
    ("cohere2", {}, PLAIN | {"scale": 0.0625}),
    ("phi", {}, PLAIN | {"bias": True}),
    ("phi3", {}, PLAIN),
    ("olmo2", {}, PLAIN),
    ("stablelm", {}, PLAIN),
    ("smollm3", {}, PLAIN),
    ("mpt", {}, PLAIN),
    ("bloom", {}, PLAIN),
    ("gpt2", {}, PLAIN),
    ("gpt_neox", {}, PLAIN),
    ("gptj", {}, PLAIN | {"bias": True}),
    ("opt", {}, PLAIN),
    ("falcon", {}, PLAIN),
    ("glm", {}, PLAIN),
    ("nanochat", {}, PLAIN | {"softcap": 15.0}),
    ("gpt_oss", {}, PLAIN),
    ("lfm2", {}, PLAIN),
    ("mixtral", {}, PLAIN),
]
REFUSED = [
    ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS}),
    ("mamba", {}),
    ("bert", {"is_decoder": True}),
    ("roberta", {"is_decoder": True}),
]


def save_language_model(golden: Path, folder: Path, kind: str, settings: dict) -> Path:
    """A random one with the golden tokenizer, its weights large enough for a cap to bite."""
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls)} - getattr(cls, "attribute_map", {}).keys()
    torch.manual_seed(0)
    config = cls(**{key: value for key, value in (SIZES | settings).items() if key in known})
    language = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in language.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    language.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / "base" / name, folder)
    return folder


def ids_and_mask() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, WORDS - 1, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "kind, settings, steps", LANGUAGE_MODELS, ids=[f"{m[0]}-{i}" for i, m in enumerate(LANGUAGE_MODELS)]
)
def test_text_has_the_logits_of_the_base(golden, tmp_path, kind, settings, steps):
    base = AutoModelForCausalLM.from_pretrained(save_language_model(golden, tmp_path / "base", kind, settings)).eval()
    model = LlavaSPForCausalLM.from_backbones(tmp_path / "base", golden / "clip", spatial_variant="none")
    config = model.config
    assert config.language_model_head_bias == steps["bias"]
    assert config.language_model_logit_scale == (steps["scale"] and pytest.approx(steps["scale"], rel=1e-6))
    assert config.language_model_logit_softcap == (steps["softcap"] and pytest.approx(steps["softcap"], rel=1e-6))
    inputs = ids_and_mask()
    labels = inputs["input_ids"]
    ours, theirs = model(**inputs, labels=labels, logits_to_keep=0), base(**inputs, labels=labels)
    torch.testing.assert_close(ours.logits[..., :WORDS], theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": WORDS - 1, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), base.generate(**inputs, **settings))

    model.save_pretrained(tmp_path / "full")
    again = LlavaSPForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind, settings", REFUSED, ids=[model[0] for model in REFUSED])
def test_what_computes_something_else_is_refused(golden, tmp_path, kind, settings):
    folder = save_language_model(golden, tmp_path / "base", kind, settings)
    with pytest.raises(ValueError, match=f"language_model {folder} is a .*, which computes more than"):
        LlavaSPForCausalLM.from_backbones(folder, golden / "clip", spatial_variant="none")


def test_steps_that_need_the_ids_are_refused(golden, tmp_path, monkeypatch):
    """A decoder that looks at ids beside their embeddings would see none of an image's."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = 2 * self.embed_tokens(input_ids)
        return forward(self, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    with pytest.raises(ValueError, match="which computes more than"):
        LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="none")


def test_transformers_llava_cannot_hold_the_steps(golden, tmp_path):
    from llava_sp.checkpoints.writing.conversion import convert

    save_language_model(golden, tmp_path / "base", "gemma2", {})
    model = LlavaSPForCausalLM.from_backbones(tmp_path / "base", golden / "clip", spatial_variant="none")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"config.json: transformers' LLaVA has no language_model_logit_softcap"):
        convert(tmp_path / "full", tmp_path / "to", target="llava_hf")
