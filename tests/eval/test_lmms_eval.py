"""The model of lmms-eval against this package's own runner and forwards made by hand; the real command on local tasks."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install -e '.[lmms-eval]'")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

from llava_sp.eval.base import SHORT_ANSWER
from llava_sp.eval.cli import main
from llava_sp.eval.lmms_eval import model as lmms_eval_model
from llava_sp.eval.lmms_eval.model import LlavaSP, Query
from llava_sp.eval.vqav2 import VQAv2
from llava_sp.inference import render_prompt
from llava_sp.shapes.make import Settings, make
from tests.messages import refused

GREEDY = {"max_new_tokens": 128, "temperature": 0, "do_sample": False}


@pytest.fixture(scope="module")
def checkpoint(repo) -> Path:
    return repo / "llava_sp/shapes/model"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmms") / "shapes"
    make(folder, Settings(questions=60, captions=1, conversations=1), log=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def own(checkpoint, data) -> Path:
    """What this package's own runner makes of the questions."""
    output = data / "own"
    arguments = ["--model", checkpoint, "--data", data / "vqav2", "--output", output, "--device", "cpu"]
    assert main(VQAv2, [str(argument) for argument in arguments]) == 0
    return output


@pytest.fixture(scope="module")
def own_answers(own) -> list[str]:
    return [json.loads(line)["text"] for line in (own / "answers.jsonl").open()]


@pytest.fixture(scope="module")
def items(data):
    return VQAv2(split="val").load(data / "vqav2")


@pytest.fixture(scope="module")
def pictures(items) -> list[Image.Image]:
    files = dict.fromkeys(item.images[0] for item in items)
    return [Image.open(file).convert("RGB") for file in files]


@pytest.fixture(scope="module")
def lm(checkpoint) -> LlavaSP:
    return LlavaSP(pretrained=str(checkpoint), batch_size=4, device="cpu")


@pytest.fixture(autouse=True)
def settings_restored(request):
    """`lm` is shared; a test that changes a setting of it changes it for itself."""
    if "lm" not in request.fixturenames:
        yield
        return
    lm = request.getfixturevalue("lm")
    before = {name: getattr(lm, name) for name in ("batch_size", "conversation_template", "likelihood", "task_dict")}
    yield
    for name, value in before.items():
        setattr(lm, name, value)


def requests_for(lm: LlavaSP, docs: list[dict], kind: str, middle, task: str = "local") -> list[Instance]:
    """Requests as the harness makes them: text, what `middle(doc)` gives, and where the document stands."""
    lm.task_dict = {**lm.task_dict, task: {"val": docs}}
    made = []
    for number, doc in enumerate(docs):
        place = {"task": task, "doc_id": number, "repeats": 1}
        made.append(Instance(kind, (doc["text"], *middle(doc), number, task, "val"), idx=0, metadata=place))
    return made


def generate(lm: LlavaSP, docs: list[dict], gen_kwargs: dict = GREEDY) -> list[str]:
    """Each document is `{"text", "images"}`, and may have generation arguments of its own."""
    requests = requests_for(
        lm, docs, "generate_until", lambda doc: (doc.get("kwargs", gen_kwargs), lambda d: d["images"])
    )
    return [result.text for result in lm.generate_until(requests)]


def by_hand(lm: LlavaSP, message: str, images: list[Image.Image], **arguments) -> str:
    """One prompt, no batch, no padding."""
    prompt = render_prompt(lm.processor, message)
    inputs = lm.processor(text=prompt, images=images or None, return_tensors="pt")
    arguments = {"do_sample": False, "max_new_tokens": 128, **arguments}
    with torch.inference_mode():
        ids = lm.model.generate(**inputs, **arguments)
    return lm.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_lmms_eval_finds_the_model_through_the_entry_point():
    assert "llava_sp" in {point.name for point in entry_points(group="lmms_eval.models")}
    assert get_model("llava_sp") is LlavaSP
    assert get_model("llava_sp", force_simple=True) is LlavaSP


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_those_of_the_own_runner(lm, items, own_answers, batch_size):
    lm.batch_size = batch_size
    docs = [{"text": item.text + SHORT_ANSWER, "images": [str(item.images[0])]} for item in items]
    assert generate(lm, docs) == own_answers
    assert len(set(own_answers)) > 5


def mixed(pictures) -> list[dict]:
    return [
        {"text": "How many red shapes are there?" + SHORT_ANSWER, "images": [pictures[0]]},
        {"text": "What color is the sky?", "images": []},
        {"text": "Which of these holds a digit?", "images": pictures[1:4]},
        {"text": "Say yes.", "images": None},
        {"text": "What digit is in the image?" + SHORT_ANSWER, "images": (pictures[5],)},
        {"text": "Are they the same?", "images": [pictures[2], pictures[2]]},
    ]


def test_several_images_and_none_in_one_batch(lm, pictures):
    docs = mixed(pictures)
    lm.batch_size = len(docs)
    expected = [
        by_hand(lm, "<image>\n" * len(doc["images"] or []) + doc["text"], list(doc["images"] or [])) for doc in docs
    ]
    assert generate(lm, docs) == expected


def test_images_may_be_pictures_files_or_bytes(lm, items):
    file = items[0].images[0]
    text = items[0].text + SHORT_ANSWER
    forms = [[Image.open(file)], [str(file)], [file], [file.read_bytes()], Image.open(file)]
    answers = generate(lm, [{"text": text, "images": form} for form in forms])
    assert len(answers) == 5 and len(set(answers)) == 1


def test_marks_in_the_text_say_where_the_images_go(lm, pictures):
    text = "First <image> then <image>: what changed?"
    docs = [{"text": text, "images": pictures[:2]}]
    seen = []
    prompt = lm.prompt
    lm.prompt = lambda query: seen.append(prompt(query)) or seen[-1]
    try:
        answers = generate(lm, docs)
    finally:
        del lm.prompt
    assert text in seen[0] and seen[0].count("<image>") == 2
    assert answers == [by_hand(lm, text, pictures[:2])]


@pytest.mark.parametrize("text, count", [("A <image> and a <image>", 1), ("A <image>", 0), ("One <image>", 2)])
def test_marks_that_do_not_fit_the_images_are_an_error(lm, pictures, text, count):
    with pytest.raises(
        ValueError, match=f"task local, document 0 of val: .* {text.count('<image>')} <image> .* {count} im"
    ):
        generate(lm, [{"text": text, "images": pictures[:count]}])


@pytest.mark.parametrize(
    "visual, parts",
    [
        ("film.mp4", ("film.mp4", "video")),
        ("speech.WAV", ("speech.WAV", "audio")),
        ({"array": [0.0], "sampling_rate": 16000}, ("dict",)),
        ("nowhere.jpg", ("nowhere.jpg",)),
        (b"no picture", ("embedded image", "10 bytes")),
    ],
)
def test_what_is_no_image_is_named_with_its_document(lm, visual, parts):
    with refused("task local, document 0 of val", *parts):
        generate(lm, [{"text": "What is this?", "images": [visual]}])


def test_a_picture_that_is_cut_off_is_named_with_its_document(lm, items, tmp_path):
    content = items[0].images[0].read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with refused("task local, document 0 of val", "truncated"):
        generate(lm, [{"text": "What is this?", "images": [Image.open(tmp_path / "half.jpg")]}])


def test_text_stops_before_a_stop_string(lm, pictures):
    """Forced to go on, the model fills 24 tokens; the first stop string ends it early, and the others of the batch not."""
    docs = mixed(pictures)
    long = {**GREEDY, "max_new_tokens": 24, "min_new_tokens": 24}
    lm.batch_size = len(docs)
    texts = generate(lm, docs, long)
    word = texts[0].split()[1]
    stops = ["", word, "neverthere"]
    requests = requests_for(lm, docs, "generate_until", lambda doc: ({**long, "until": stops}, lambda d: d["images"]))
    results = lm.generate_until(requests)
    assert [result.text for result in results] == [text.split(word)[0].strip() for text in texts]
    counts = [result.token_counts.output_tokens for result in results]
    assert counts[0] < 24
    assert all(count == 24 for count, text in zip(counts, texts) if word not in text)
    assert generate(lm, docs[:1], {**long, "until": word}) == [texts[0].split(word)[0].strip()]


def test_stop_strings_of_the_prompt_stop_nothing(lm, pictures):
    docs = [{"text": "What color is it?", "images": pictures[:1]}]
    assert generate(lm, docs, {**GREEDY, "until": ["ASSISTANT:", "USER"]}) == generate(lm, docs)


def test_token_counts(lm, pictures):
    docs = mixed(pictures)
    requests = requests_for(lm, docs, "generate_until", lambda doc: (GREEDY, lambda d: d["images"]))
    for doc, result in zip(docs, lm.generate_until(requests)):
        message = "<image>\n" * len(doc["images"] or []) + doc["text"]
        inputs = lm.processor(text=render_prompt(lm.processor, message), images=doc["images"] or None)
        assert result.token_counts.input_tokens == inputs["input_ids"].shape[1]
        assert 1 <= result.token_counts.output_tokens <= 128


def test_generation_arguments_of_each_request(lm, pictures):
    """Equal ones share a batch; the results are in the order of the requests; nothing is taken from the task's dict."""
    every = [
        {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3},
        {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12},
        {**GREEDY, "num_beams": 3, "until": ["\n\n"]},
        {"until": ["\n\n"]},
        {**GREEDY, "image_aspect_ratio": "original", "top_p": None, "until": None},
        {**GREEDY, "do_sample": True, "top_p": 0.2},
        {**GREEDY, "repetition_penalty": 1.8, "max_new_tokens": 20, "min_new_tokens": 20},
    ]
    same = [{}, {}, {"num_beams": 3}, {"max_new_tokens": 1024}, {}, {}, {"repetition_penalty": 1.8}]
    docs, expected = [], []
    for repeat in range(2):
        for kwargs, extra in zip(every, same):
            doc = {"text": "Describe it.", "images": [pictures[repeat + 3]], "kwargs": copy.deepcopy(kwargs)}
            lengths = {name: kwargs[name] for name in ("max_new_tokens", "min_new_tokens") if name in kwargs}
            docs.append(doc)
            expected.append(by_hand(lm, "<image>\nDescribe it.", doc["images"], **{**lengths, **extra}))
    assert generate(lm, docs) == expected
    assert [doc["kwargs"] for doc in docs] == every * 2
    assert len(set(expected)) > 4


@pytest.mark.parametrize("asked", [{"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.6}, {"do_sample": True}])
def test_sampling_is_asked_for_by_temperature_or_do_sample(lm, pictures, asked):
    doc = {"text": "Describe the image.", "images": pictures[:1]}
    meant = {"do_sample": True, "temperature": 1.0, "top_p": None, **asked}
    drawn = []
    for seed in range(3):
        torch.manual_seed(seed)
        drawn += generate(lm, [doc], {"max_new_tokens": 16, "min_new_tokens": 16, **asked})
        torch.manual_seed(seed)
        assert drawn[-1] == by_hand(
            lm, "<image>\n" + doc["text"], doc["images"], **{"min_new_tokens": 16, "max_new_tokens": 16, **meant}
        )
    assert len(set(drawn)) > 1


def test_do_sample_false_is_greedy_at_any_temperature(lm, pictures):
    docs = [{"text": "Describe the image.", "images": pictures[:1]}]
    assert generate(lm, docs, {**GREEDY, "temperature": 5.0}) == generate(lm, docs)


@pytest.mark.parametrize("wrong", [{"max_gen_tokens": 3}, {"num_return_sequences": 2}])
def test_unknown_generation_arguments_are_refused_before_anything_is_generated(lm, pictures, monkeypatch, wrong):
    monkeypatch.setattr(lm, "_answer", lambda *given: pytest.fail("generated"))
    docs = [{"text": "a long text goes first", "images": []}, {"text": "b", "images": [], "kwargs": wrong}]
    with pytest.raises(ValueError, match=re.escape(f"generation_kwargs holds {wrong}")):
        generate(lm, docs)


def test_tasks_may_share_a_batch(lm, pictures):
    """Equal generation arguments bring requests of several tasks together; each has its own documents."""
    lm.batch_size = 8
    first, second = ([{"text": "What color is it?", "images": [picture]}] for picture in pictures[:2])
    requests = []
    for name, docs in (("first", first), ("second", second)):
        requests += requests_for(lm, docs, "generate_until", lambda doc: (GREEDY, lambda d: d["images"]), name)
    expected = [by_hand(lm, "<image>\nWhat color is it?", docs[0]["images"]) for docs in (first, second)]
    assert [result.text for result in lm.generate_until(requests)] == expected


def test_memory_trouble_names_the_flag(lm, pictures, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(lm.model, "generate", full)
    with refused("2 requests", "--batch_size", "CUDA", error=MemoryError):
        generate(lm, mixed(pictures)[:2])


def log_probability_by_hand(lm: LlavaSP, message: str, images: list, answer: str) -> tuple[float, bool]:
    """Teacher forcing on one unpadded row, all logits, token by token, with the ids that training makes."""
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    ids, labels = lm.processor.encode_conversation(turns)
    ids, labels = ids[:-1], labels[:-1]  # the end token is no part of the answer
    assert lm.processor.tokenizer.eos_token_id not in ids
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = lm.processor.preprocess_images(images)
    with torch.inference_mode():
        logits = lm.model(**inputs).logits[0].double()
    total, greedy = 0.0, True
    for position, label in enumerate(labels):
        if label != -100:
            total += float(logits[position - 1].log_softmax(-1)[label])
            greedy &= int(logits[position - 1].argmax()) == label
    return total, greedy


def likelihoods(lm: LlavaSP, docs: list[dict]) -> list[tuple[float, bool]]:
    requests = requests_for(lm, docs, "loglikelihood", lambda doc: (doc["answer"], lambda d: d["images"]))
    return [result.text for result in lm.loglikelihood(requests)]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_loglikelihood_is_the_hand_computed_one(lm, pictures, batch_size):
    lm.batch_size, lm.likelihood = batch_size, "logprob"
    docs = [
        {**doc, "answer": answer}
        for doc in mixed(pictures)
        for answer in ("yes", "0", " 3", "a small red circle at the top left", "No.")
    ]
    expected = [
        log_probability_by_hand(
            lm, "<image>\n" * len(d["images"] or []) + d["text"], list(d["images"] or []), d["answer"].strip()
        )
        for d in docs
    ]
    found = likelihoods(lm, docs)
    torch.testing.assert_close([f[0] for f in found], [e[0] for e in expected], rtol=1e-4, atol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert {e[1] for e in expected} == {True, False}


def test_the_greedy_answer_is_greedy_and_any_other_is_not(lm, items, own_answers):
    docs = [
        {"text": item.text + SHORT_ANSWER, "images": [str(item.images[0])], "answer": answer + more}
        for item, answer in list(zip(items, own_answers))[:12]
        for more in ("", "ness")
    ]
    assert [greedy for _, greedy in likelihoods(lm, docs)] == [True, False] * 12


def test_smaller_is_better_unless_said_otherwise(lm, pictures):
    """lmms-eval's multiple choice takes the smallest number."""
    docs = [{**mixed(pictures)[0], "answer": answer} for answer in ("0", "a purple square")]
    nll = [value for value, _ in likelihoods(lm, docs)]
    assert 0 < nll[0] < nll[1]
    lm.likelihood = "logprob"
    assert [value for value, _ in likelihoods(lm, docs)] == [-value for value in nll]


def test_an_answer_without_its_question(lm):
    """What `acc_mutual_info` asks for."""
    lm.likelihood = "logprob"
    request = Instance("loglikelihood", ("", "red"), idx=0, metadata={"task": "t", "doc_id": 0, "repeats": 1})
    ((value, greedy),) = (result.text for result in lm.loglikelihood([request]))
    expected = log_probability_by_hand(lm, "", [], "red")
    assert value == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]


def test_the_answer_may_be_a_function_of_the_document(lm, pictures):
    doc = {**mixed(pictures)[0], "answer": lambda d: d["target"], "target": "blue"}
    assert likelihoods(lm, [doc]) == likelihoods(lm, [{**doc, "answer": "blue"}])


@pytest.mark.parametrize("answer", ["", "  ", "an <image>", 3, ["yes"]])
def test_an_answer_that_cannot_be_scored(lm, pictures, answer):
    with refused("task local, document 0 of val", "answer", repr(answer), "<image>"):
        likelihoods(lm, [{**mixed(pictures)[0], "answer": answer}])


def test_rounds(lm, pictures):
    """Documents of one, two and three rounds in one batch; a later round has its own text and images, and sees what was
    answered."""
    lm.batch_size = 3
    docs = [{"text": "What color is it?", "images": [pictures[i]], "rounds": i + 1} for i in range(3)]
    calls = []

    def doc_to_text(doc, round_idx, previous_output, previous_round_info):
        calls.append((doc["rounds"], round_idx, list(previous_output), previous_round_info))
        if round_idx == doc["rounds"]:
            return None, None, True, [*previous_output, "closed"], None
        return [pictures[4], pictures[5]], f"After {previous_output[-1]}?", False, None, f"note {round_idx}"

    requests = requests_for(
        lm, docs, "generate_until_multi_round", lambda doc: (GREEDY, lambda d: d["images"], doc_to_text)
    )
    expected = []
    for doc in docs:
        outputs = [by_hand(lm, "<image>\n" + doc["text"], doc["images"])]
        for _ in range(doc["rounds"] - 1):
            outputs.append(by_hand(lm, f"<image>\n<image>\nAfter {outputs[-1]}?", [pictures[4], pictures[5]]))
        expected.append([*outputs, "closed"])
    assert lm.generate_until_multi_round(requests) == expected
    assert (3, 3, expected[2][:3], "note 2") in calls


def test_a_round_that_is_no_round(lm, pictures):
    docs = [{"text": "What color is it?", "images": []}]
    requests = requests_for(
        lm, docs, "generate_until_multi_round", lambda doc: (GREEDY, lambda d: d["images"], lambda d, **_: "more")
    )
    with refused("task local, document 0 of val", "doc_to_text", "'more'", "round 1"):
        lm.generate_until_multi_round(requests)


def test_the_conversation_template_of_model_args(lm, pictures):
    lm.conversation_template, lm.likelihood = "llama_2", "logprob"
    prompt = lm.prompt(Query("here", "<image>\nWhat color?", (pictures[0],)))
    assert prompt.startswith("[INST] <<SYS>>") and prompt.endswith("[/INST]")
    ids, count = lm.encode(Query("here", "What color?", ()), "red")
    turns = [{"role": "user", "content": "What color?"}, {"role": "assistant", "content": "red"}]
    trained, _ = lm.processor.encode_conversation(turns, "llama_2")
    assert trained[: len(ids)] == ids and count >= 1
    assert lm.processor.tokenizer.decode(ids[-count:]).strip() == "red"


def test_a_moved_adapter_and_other_model_args(checkpoint, repo, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "moved")
    backbones = repo / "llava_sp/shapes/backbones"
    lm = LlavaSP.create_from_arg_string(
        f"pretrained={tmp_path / 'moved'},language_model={backbones / 'llama'},vision_tower={backbones / 'clip'},"
        "dtype=bfloat16,image_aspect_ratio=crop,conversation_template=vicuna_v1,use_cache=False",
        {"batch_size": "2", "max_batch_size": None, "device": "cpu"},
    )
    assert (lm.model.dtype, lm.processor.image_aspect_ratio, lm.batch_size) == (torch.bfloat16, "crop", 2)
    seen = []
    generation = lm.model.generate
    lm.model.generate = lambda **kwargs: seen.append(kwargs["use_cache"]) or generation(**kwargs)
    assert len(generate(lm, [{"text": "Hello?", "images": []}])) == 1
    assert seen == [False]
    lm.clean()  # what the harness calls at the end
    assert not hasattr(lm, "model")


@pytest.mark.parametrize(
    "given, parts",
    [
        ({"pretrained": None}, ("pretrained is None", "text")),
        ({"pretrained": "./nowhere"}, ("model ./nowhere", "directory", "hub")),
        ({"dtype": "int8"}, ("dtype is 'int8'", "'auto' or 'float32'")),
        ({"image_aspect_ratio": "anyres"}, ("image_aspect_ratio is 'anyres'", "None or 'pad' or 'crop'")),
        ({"conversation_template": "alpaca"}, ("template 'alpaca'",)),
        ({"likelihood": "ppl"}, ("likelihood is 'ppl'", "'nll' or 'logprob'")),
        ({"use_cache": "no"}, ("use_cache is 'no'", "True or False")),
        ({"batch_size": "auto"}, ("batch_size is 'auto'", "whole number above 0")),
        ({"batch_size": 0}, ("batch_size is 0", "whole number above 0")),
        ({"device": "cuda:77"}, ("--device cuda:77",)),
        (
            {"attn": "flash", "max_batch_size": 3},
            ("--model_args", "attn, max_batch_size", "pretrained, language_model"),
        ),
    ],
)
def test_wrong_model_args(checkpoint, given, parts):
    with refused(*parts):
        LlavaSP(**{"pretrained": str(checkpoint), "device": "cpu", **given})


def test_one_device_for_several_processes(checkpoint, monkeypatch):
    class Processes:
        process_index, num_processes, local_process_index = 1, 2, 1

    monkeypatch.setattr(lmms_eval_model, "PartialState", Processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused("--device cuda:0", "2 processes"):
        LlavaSP(pretrained=str(checkpoint), device="cuda:0")


MIXED_UTILS = """
def visual(doc):
    return [image.convert("RGB") for image in doc["images"]]

def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
MIXED_TASK = """
task: shapes_mixed
dataset_path: {folder}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function mixed_utils.visual
doc_to_text: question
doc_to_target: answer
process_results: !function mixed_utils.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(repo, data, lm, pictures) -> Path:
    """The example tasks beside their data, and one whose data set holds its images: several, one or none per question.
    Its right answers are those of the model."""
    import datasets

    shutil.copytree(repo / "configs/lmms_eval", data / "tasks")
    rows = []
    for doc in mixed(pictures):
        images = list(doc["images"] or [])
        answer = by_hand(
            lm, "<image>\n" * len(images) + doc["text"], images, max_new_tokens=1024
        )  # the task names none
        rows.append({"question": doc["text"], "images": images, "answer": answer})
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "images": datasets.Sequence(datasets.Image()),
            "answer": datasets.Value("string"),
        }
    )
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows, features)}).save_to_disk(data / "mixed")
    (data / "tasks" / "mixed_utils.py").write_text(MIXED_UTILS)
    (data / "tasks" / "shapes_mixed.yaml").write_text(MIXED_TASK.format(folder=data / "mixed"))
    return data / "tasks"


def run_harness(launcher: list[str], checkpoint: Path, tasks: Path, output: Path, *more: str) -> tuple[dict, dict]:
    """The scores, and the logged samples by task."""
    command = [
        *(sys.executable, *launcher, "-m", "lmms_eval", "--model", "llava_sp"),
        *("--model_args", f"pretrained={checkpoint}", "--include_path", str(tasks), "--output_path", str(output)),
        *("--tasks", "shapes_vqa,shapes_choice,shapes_mixed", "--batch_size", "4", "--log_samples", *more),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tasks.parent / "hf"),
        "LMMS_EVAL_HOME": str(tasks.parent / "hf"),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tasks.parent)
    files = list(output.glob("*/*_results.json"))
    assert run.returncode == 0 and len(files) == 1, run.stdout + run.stderr
    samples = {}
    for log in output.glob("*/*_samples_*.jsonl"):
        lines = [json.loads(line) for line in log.open()]
        samples[log.stem.split("_samples_")[1]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(files[0].read_text()), samples


def check_scores(results: dict, samples: dict, lm: LlavaSP, data: Path, own: Path, own_answers: list[str]) -> None:
    scores = results["results"]
    assert scores["shapes_vqa"]["vqa_accuracy,none"] == json.loads((own / "metrics.json").read_text())["score"]
    assert [line["filtered_resps"] for line in samples["shapes_vqa"]] == own_answers
    assert scores["shapes_mixed"]["exact,none"] == 1.0

    annotations = json.loads((data / "vqav2/v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    by_type: dict[str, set[str]] = {}
    for record in annotations:
        by_type.setdefault(record["question_type"], set()).add(record["multiple_choice_answer"])
    hits = []
    for item, record in zip(VQAv2(split="val").load(data / "vqav2"), annotations):
        choices = sorted(by_type[record["question_type"]])
        query = Query("here", "<image>\n" + item.text + SHORT_ANSWER, (Image.open(item.images[0]),))
        values = [value for value, _ in lm.log_probabilities([query] * len(choices), choices)]
        hits.append(choices[values.index(max(values))] == record["multiple_choice_answer"])
    assert scores["shapes_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < sum(hits) < len(hits)


def test_the_real_command(lm, checkpoint, tasks, data, own, own_answers, tmp_path):
    results, samples = run_harness([], checkpoint, tasks, tmp_path / "out")
    check_scores(results, samples, lm, data, own, own_answers)
    assert results["throughput"]["total_gen_tokens"] > 60


def test_two_processes(lm, checkpoint, tasks, data, own, own_answers, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results, samples = run_harness(launcher, checkpoint, tasks, tmp_path / "out")
    check_scores(results, samples, lm, data, own, own_answers)


def test_stored_responses_are_found_again(checkpoint, tasks, own_answers, tmp_path):
    """`--use_cache`: the second command generates nothing, so the arguments it is keyed by were left as they were."""
    more = ("--use_cache", str(tmp_path / "cache"), "--tasks", "shapes_vqa")
    run_harness([], checkpoint, tasks, tmp_path / "first", *more)
    results, samples = run_harness([], checkpoint, tasks, tmp_path / "second", *more)
    assert [line["filtered_resps"] for line in samples["shapes_vqa"]] == own_answers
    assert "throughput" not in results
