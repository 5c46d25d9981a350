"""The values of every key: what cannot be is refused with its file, key and value, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_sp import LlavaSPForCausalLM
from llava_sp.config.arguments import DataArguments, ModelArguments, TrainArguments, load_config, read_keys
from llava_sp.config.keys import FORMER, HONOURED, INSTEAD, NEEDS
from llava_sp.model.configuration_llava_sp import PROJECTOR_SETTINGS, LlavaSPConfig
from llava_sp.train.preflight import check_inputs

OURS = {name for kind in (ModelArguments, DataArguments, TrainArguments) for name in kind.__annotations__} - {
    "projector"
}
DEFAULTS = {f.name: f.default for kind in (ModelArguments, DataArguments, TrainArguments) for f in fields(kind)}
DEFAULTS |= {name: f.default for name, f in PROJECTOR_SETTINGS.items()}
KEYS = sorted(OURS | set(HONOURED) | set(PROJECTOR_SETTINGS))

TEXTS = {
    "attn_implementation", "conversation_template", "data_manifest", "data_path", "data_source", "deepspeed", "eval_data_path",
    "eval_image_folder", "image_folder", "language_model", "mixture", "output_dir", "precompute_features", "project",
    "projector_checkpoint", "run_name", "spatial_variant", "stage", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "vision_tower", "warm_start",
}  # fmt: skip
OBJECTS = {
    "activation_checkpointing_kwargs", "deepspeed", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
}  # fmt: skip
# What may be below 1; the projector's ranges depend on the tower (LlavaSPConfig has them).
ZERO = {
    "adam_beta1", "adam_beta2", "data_seed", "dataloader_num_workers", "eval_delay", "learning_rate", "lora_dropout",
    "max_grad_norm", "projector_lr", "seed", "validation_fraction", "warmup_steps", "weight_decay",
}  # fmt: skip
MINUS_ONE = {"local_rank", "max_steps", *PROJECTOR_SETTINGS}
BAD = {
    "negative": -1, "very negative": -(10**12), "zero": 0, "nan": math.nan, "infinite": math.inf, "mapping": {"a": 1},
    "two values": [2, 3], "two texts": ["a", "b"], "a list of lists": [[]], "huge": 10**4000, "5000 digits": "9" * 5000,
    "hexadecimal": int("f" * 5000, 16), "nothing": None, "no text": "\ud800", "NUL": "a\0b", "tag": "!!int",
}  # fmt: skip


def is_right(key: str, name: str) -> bool:
    """Whether this value is one that the key may have after all."""
    of_text = name in ("negative", "very negative", "zero", "nan", "infinite", "5000 digits", "tag")
    kind, default = HONOURED.get(key), DEFAULTS.get(key)
    if key in TEXTS and of_text:
        return True
    if name == "nothing":
        return default is None or key in ("report_to", "watchdog_minutes")
    truths = (bool, bool | None, HONOURED["activation_checkpointing"])
    if isinstance(default, bool) or kind in truths or key in ("spatial_fusion", "spatial_projection_bias"):
        return name == "zero"
    return (
        (name == "zero" and key in ZERO | PROJECTOR_SETTINGS.keys() | {"local_rank"})
        or (name == "negative" and key in MINUS_ONE)
        or (name == "mapping" and key in OBJECTS and "checkpointing" not in key)
        or (name == "two values" and key in ("spatial_scales", "vision_feature_layer"))
        or (name in ("two texts", "tag", "5000 digits") and key == "lora_target_modules")
        or (name in ("infinite", "5000 digits") and key == "max_grad_norm")
        or (name == "zero" and key == "include_num_input_tokens_seen")
    )


@pytest.mark.parametrize("key", KEYS)
def test_values_that_cannot_be(key, tmp_path):
    file = tmp_path / "c.yaml"
    for name, value in BAD.items():
        file.write_text(yaml.safe_dump({key: value}) if name not in ("huge", "hexadecimal") else f"{key}: 0x{value:x}")
        if is_right(key, name):
            if key not in ("deepspeed", *NEEDS):  # these need more
                read_keys(file)
            continue
        with pytest.raises(ValueError) as caught:
            load_config(file)
        message = str(caught.value)
        assert message.startswith(f"{file}: {key}") and " is " in message and "; expected " in message, (name, message)
        assert "\n" not in message and len(message) < 600


def test_every_key_of_transformers_is_honoured_or_refused():
    names = {f.name for f in fields(TrainingArguments) if f.init}
    assert set(HONOURED) | set(INSTEAD) == names and not set(HONOURED) & set(INSTEAD)
    assert not set(FORMER) & (names | OURS) and set(FORMER.values()) <= set(KEYS)


OTHER = {bool: True, str: "steps", int: 7, float: 0.5, type(None): "x", list: ["loss"]}


@pytest.mark.parametrize("key", sorted(INSTEAD))
def test_a_key_that_is_not_honoured_may_have_its_default_alone(key):
    field = {f.name: f for f in fields(TrainingArguments)}[key]
    default = field.default if not callable(field.default_factory) else field.default_factory()
    assert read_keys(None, {key: default}) == {key: default}
    other = not default if isinstance(default, bool) else OTHER[type(default)]
    with pytest.raises(ValueError, match=rf"command line: {key} is .*; expected its default, .* \(.+\)$"):
        read_keys(None, {key: other})


def test_an_empty_deepspeed_file_is_named(tmp_path):
    file = tmp_path / "zero.json"
    for text, words in (("{}", "is {}; expected an object with settings"), ('{"zero_optimization": 2}', "is 2")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"command line: deepspeed: {file}:? .*{words}"):
            read_keys(None, ["--deepspeed", str(file)])


def test_former_names_lead_to_todays():
    with pytest.raises(ValueError, match="unknown key 'warmup_ratio'; did you mean 'warmup_steps'"):
        read_keys(None, ["--warmup_ratio", "0.03"])


def test_why_label_smoothing_is_refused():
    """Trainer shifts the labels only for classes of this list."""
    assert LlavaSPForCausalLM.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps'; it needs eval_data_path or validation_fraction"),
        ({"do_eval": True}, "do_eval is True; it needs eval_data_path or validation_fraction"),
        ({"eval_on_start": True}, "eval_on_start is True; it needs eval_data_path or validation_fraction"),
        ({"eval_image_folder": "/x"}, "eval_image_folder is '/x'; it needs eval_data_path"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers is True; it needs dataloader_num"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor is 2; it needs dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "fork"}, "dataloader_multiprocessing_context is 'fork'; it needs"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "lr_scheduler_kwargs is set, but constant",
        ),
        ({"lr_scheduler_kwargs": {"min_lr": math.nan}}, "lr_scheduler_kwargs.min_lr is nan; expected a number"),
        (
            {"gradient_checkpointing_kwargs": {"reentrant": True}},
            "gradient_checkpointing_kwargs is {'reentrant': True}",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": "x"}},
            "gradient_checkpointing_kwargs.use_reentrant is 'x'; expected true or false",
        ),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5; expected a whole number of steps, or a share"),
        ({"logging_steps": 1.5}, "logging_steps is 1.5; expected a whole number of steps, or a share"),
        ({"max_steps": 0}, "max_steps is 0; expected a whole number from 1 on, or -1"),
        ({"report_to": "a,b"}, "report_to is 'a,b'; expected none, all, or one or several (--report_to a b) of"),
        ({"report_to": ["none", "wandb"]}, "report_to is ['none', 'wandb']; expected none, all,"),
        ({"deepspeed": '{"a": '}, "deepspeed is '{\"a\": '; expected an object with settings or the name of a file"),
        ({"learning_rate": 1e308}, "learning_rate is 1e+308; expected a number from 0 to 1000"),
        ({"projector_lr": 1001}, "projector_lr is 1001; expected a number from 0 to 1000"),
        ({"deepspeed": {}}, "deepspeed is {}; expected an object with settings"),
        ({"run_name": True}, "run_name is True; expected text"),
        ({"save_strategy": "best"}, "save_strategy is 'best'; expected 'no' or 'steps' or 'epoch'"),
    ],
)
def test_values_that_would_fail_later_or_do_nothing(keys, message):
    with pytest.raises(ValueError) as caught:
        load_config(None, keys)
    assert f"command line: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"report_to": "codecarbon"}, r"report_to = \['codecarbon'\]: .*requires"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs = None: One of min_lr or min_lr_rate"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_kwargs = {'cycles': 2}: .*unexpected keyword"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            r"num_cycles.*could not convert .*\(lr_scheduler_type = cosine\)",
        ),
    ],
)
def test_what_trainer_would_say_later(keys, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(load_config(None, keys))


@pytest.mark.parametrize("name", HONOURED["optim"].__args__)
def test_optimizers_take_a_step_on_our_groups(name):
    weight = torch.nn.Parameter(torch.ones(4))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(load_config(None, {"optim": name}).train)
    optimizer = kind([{"params": [weight], "lr": 0.1, "weight_decay": 0.0, "name": "lora"}], **options)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("value", [-1, 0, [], [0], [4, 4], [99], 10**8])
@pytest.mark.parametrize("key", ["spatial_scales", "spatial_width", "fusion_kernel", "fusion_stride"])
def test_values_of_the_projector(key, value):
    """LlavaSPConfig knows the grid, which decides what is right."""
    if isinstance(value, list) != (key == "spatial_scales") or (value == 10**8 and key != "fusion_kernel"):
        return
    towers = {
        "hidden_size": 8,
        "image_size": 56,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "model_type": "clip_vision_model",
    }
    with pytest.raises(ValueError, match=f"{key} is .*; it must be"):
        LlavaSPConfig(vision_config=towers, vision_feature_layer=-1, **{key: value})


def test_files_that_are_no_configuration_are_named_on_one_line(tmp_path: Path, monkeypatch):
    file, deep = tmp_path / "c.yaml", 600
    bomb = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
    contents: dict[str | bytes, str] = {
        "a: [": "is not valid YAML: expected the node content, .*, line 1 column 5",
        "a: é".encode("utf-16"): "is not UTF-8 text",
        "a: é".encode("utf-16-le"): "is not (UTF-8 text|valid YAML)",
        "a: é".encode("latin-1"): "is not UTF-8 text",
        b"\0" * 512: "is not valid YAML: .*#x0000",
        "[" * deep + "]" * deep: "is not valid YAML: .*recursion",
        "run_name: " + "[" * deep + "]" * deep: "is not valid YAML: .*recursion",
        bomb: "is not valid YAML: it stands for more than a million values",
        "a: &a [*a]": "is not valid YAML: it stands for more than a million values",
        "seed: 1\nrun_name: x\nseed: 2": "is not valid YAML: the key seed is there twice, line 3 column 1",
        "seed: !!int": "is not valid YAML",
        "seed: !!bool x": "is not valid YAML",
        "seed: !!timestamp x": "is not valid YAML",
        "seed: !!python/object:os.system x": "is not valid YAML: could not determine a constructor",
        "seed: 2024-99-99": "is not valid YAML: month must be in 1..12",
        "seed: " + "9" * 5000: "is not valid YAML: Exceeds the limit",
        "seed: 1\n--- \nseed: 2": "is not valid YAML: but found another document",
        "? [a]\n: 1": "is not valid YAML: found unhashable key",
        'base: "a\\0b"': "base is 'a.x00b'; expected text",
        "base: 3": "base is 3; expected text or null",
        '"\\ud800": 1': "unknown key",
        "null: 1": "unknown key 'None'",
        "data_path: ${HERE}/x": "needs the environment variable HERE",
    }
    for content, message in contents.items():
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ValueError, match=message) as caught:
            load_config(file)
        text = str(caught.value)
        assert text.startswith(str(file)) and "\n" not in text and len(text) < 500
    monkeypatch.setenv("HERE", "a: b: c")
    file.write_text("run_name: ${HERE}\nseed: &s 3\ndata_seed: *s")
    assert read_keys(file) == {"run_name": "a: b: c", "seed": 3, "data_seed": 3}
