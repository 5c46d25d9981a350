"""ConversationDataset: good samples, each kind of bad one under `fail` and `skip`, lengths, weights, splits."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_sp.data import preview
from llava_sp.data.collator import Collator
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import load_mixture


def learned_text(dataset, sample) -> str:
    return dataset.processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])


def test_samples(world, make_record):
    records = [
        make_record("<image>\nWhat?", "Red.", "a.png"),
        make_record("Hello", "Hi there."),
        make_record("Compare <image> and <image>", "Same.", ["a.png", "b.png"]),
        make_record("What is it?\n<image>", "Blue.", "b.png"),
    ]
    dataset = world(records)
    samples = list(dataset)  # a loop ends by itself
    assert [learned_text(dataset, sample).strip() for sample in samples] == [
        "Red.</s>",
        "Hi there.</s>",
        "Same.</s>",
        "Blue.</s>",
    ]
    assert "pixel_values" not in samples[1] and samples[2]["pixel_values"].shape == (2, 3, 28, 28)
    assert torch.equal(samples[2]["pixel_values"][0], samples[0]["pixel_values"][0])
    assert torch.equal(samples[2]["pixel_values"][1], samples[3]["pixel_values"][0])
    placeholder = dataset.processor.image_token_id
    assert [int((sample["input_ids"] == placeholder).sum()) for sample in samples] == [7, 0, 14, 7]
    assert all(sample["input_ids"].dtype == sample["labels"].dtype == torch.long for sample in samples)
    assert dataset.lengths == [2 + 1 + 7, 3, 4 + 1 + 14, 4 + 1 + 7]
    assert dataset.modality_lengths == [3, -3, 5, 5]
    assert dataset.close_report() == {"skipped": 0, "cut": 0, "file": None}
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2]["input_ids"], samples[2]["input_ids"])


BAD = {
    "missing image": (("<image>\nWhat?", "x", "none.png"), "none.png cannot be opened"),
    "image outside": (("<image>\nWhat?", "x", "../../x.jpg"), "outside the image folder"),
    "zero bytes": (("<image>\nWhat?", "x", "empty.png"), r"is empty \(0 bytes\)"),
    "text as image": (("<image>\nWhat?", "x", "text.jpg"), "is not an image"),
    "image without mark": (("What?", "x", "a.png"), r"0 <image> marks in the text, but 1 image"),
    "two marks, one image": (("<image>\n<image>\nWhat?", "x", "a.png"), r"2 <image> marks in the text, but 1 image in the record"),
    "one mark, two images": (("<image>\nWhat?", "x", ["a.png", "b.png"]), r"1 <image> mark in the text, but 2 images"),
    "empty answer": (("What?", "", None), "nothing to learn: the conversation holds no answer"),
    "image cut": (("1 2 3 4 5 6 7 8 9 10 11 12 <image> <image>", "x", ["a.png", "b.png"]), r"its last image ends at token \d+, but model_max_length is 60"),
    "answer cut": (("word " * 60, "x", None), r"nothing to learn: the conversation, cut from \d+ to 60 tokens, holds no answer"),
}  # fmt: skip


def records_with(make_record, bad: dict) -> list[dict]:
    good = [make_record("<image>\nWhat?", "Red.", "a.png"), make_record("Hello", "Hi.")]
    return [good[0], bad, good[1], good[0]]


@pytest.fixture
def broken_files(world):
    (world.folder / "images" / "empty.png").write_bytes(b"")
    (world.folder / "images" / "text.jpg").write_text("not an image")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_ends_the_run_with_file_and_index(world, broken_files, make_record, case):
    (question, answer, image), message = BAD[case]
    dataset = world(records_with(make_record, make_record(question, answer, image)), model_max_length=60)
    with pytest.raises(ValueError, match=rf"data\.json, record 1: .*{message}"):
        dataset[1]
    dataset[0], dataset[2]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_replaced_by_the_next_and_listed(world, broken_files, make_record, case):
    (question, answer, image), message = BAD[case]
    listed = world.folder / "out" / "skipped.jsonl"
    records = records_with(make_record, make_record(question, answer, image))
    dataset = world(records, model_max_length=60, on_bad_sample="skip", skipped_path=listed)
    assert torch.equal(dataset[1]["input_ids"], dataset[2]["input_ids"])
    dataset[1]
    assert dataset.close_report() == {"skipped": 1, "cut": 0, "file": str(listed)}
    (line,) = [json.loads(line) for line in listed.read_text().splitlines()]
    assert (line["kind"], line["index"]) == ("skipped", 1) and line["file"].endswith("data.json")
    assert re.search(message, line["reason"])


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], r"id 'x': conversations is \[\]"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "turn 1 is by the user"),
        ([{"from": "tool", "value": "a"}], r"conversations\[0\].from is 'tool'"),
        ([{"from": "gpt", "value": "a"}], "no user turn"),
        ([{"from": "human", "value": "a"}], "nothing to learn"),
    ],
)
def test_bad_conversations(world, make_record, turns, message):
    with pytest.raises(ValueError, match=f"record 0: .*{message}"):
        world([make_record("", "", conversations=turns)])[0]


def test_workers_list_each_bad_sample_once(world, make_record):
    records = [make_record("Hello", "Hi." if i % 3 else "") for i in range(30)]
    listed = world.folder / "skipped.jsonl"
    dataset = world(records, on_bad_sample="skip", skipped_path=listed)
    for _ in range(2):  # two epochs, workers anew in each
        loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=Collator(dataset.processor.pad_token_id))
        assert sum(len(batch["input_ids"]) for batch in loader) == 30
    assert dataset.close_report()["skipped"] == 10
    for line in listed.read_text().splitlines():
        assert json.loads(line)["index"] % 3 == 0


def test_nothing_but_bad_samples(world, make_record):
    dataset = world([make_record("Hello", "")] * 3, on_bad_sample="skip", skipped_path=world.folder / "s.jsonl")
    bad = r"3 bad samples in a row from .*data\.json, record 1 on \(which is every one\); .*s\.jsonl lists them\. The first: nothing"
    with pytest.raises(ValueError, match=bad):
        dataset[1]


def test_a_full_disk_names_the_list_of_skipped_samples(world, make_record):
    listed = world.folder / "s.jsonl"
    listed.symlink_to("/dev/full")
    dataset = world([make_record("Hello", ""), make_record("Hello", "Hi.")], on_bad_sample="skip", skipped_path=listed)
    with pytest.raises(OSError, match=f"cannot write {listed}: No space left on device"):
        dataset[0]


def test_long_text_is_cut_and_counted(world, make_record):
    listed = world.folder / "s.jsonl"
    dataset = world(
        [make_record("<image>\nCount", "1 2 3 4 5 6 7 8 9", "a.png")], model_max_length=55, skipped_path=listed
    )
    sample = dataset[0]
    assert len(sample["input_ids"]) == 55 and "pixel_values" in sample
    assert learned_text(dataset, sample).strip().startswith("1 2")
    assert dataset.close_report() == {"skipped": 0, "cut": 1, "file": str(listed)}
    line = json.loads(listed.read_text())
    assert line["kind"] == "cut" and line["limit"] == 55 and line["tokens"] > 55


def test_cut_like_the_original(golden, tmp_path, processor):
    """The original's collator counts an image as one token when it cuts; ours as all that it has."""
    cases = json.loads((golden / "tokenization.json").read_text(encoding="utf-8"))["cases"]
    case = next(case for case in cases if case["name"] == "overlong_image")
    (tmp_path / "data.json").write_text(json.dumps([case["sample"]]))
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    checked = 0
    for result in case["results"]:
        if result["legacy"]:
            continue
        template = {"v1": "vicuna_v1", "plain": "plain"}[result["mode"]]
        sources = load_mixture([{"annotations": tmp_path / "data.json"}])
        limit = case["model_max_length"] + processor.num_image_tokens - 1
        sample = ConversationDataset(sources, processor, template, model_max_length=limit)[0]
        expected = result["after_collator"]
        place = expected["input_ids"].index(-200)
        for key, fill in (("input_ids", processor.image_token_id), ("labels", -100)):
            ids = expected[key]
            assert sample[key].tolist() == ids[:place] + [fill] * processor.num_image_tokens + ids[place + 1 :]
        checked += 1
    assert checked == 2


def test_golden_samples_that_are_bad_here(golden, tmp_path, processor):
    """Marks and images that differ: the original trains on them, or merges the marks of a turn."""
    cases = {case["name"]: case["sample"] for case in json.loads((golden / "tokenization.json").read_text())["cases"]}
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    counts = {
        "image_key_but_no_mark": "0 .* but 1",
        "two_image_marks_in_one_turn": "2 .* but 1",
        "image_marks_in_two_turns": "2 .* but 1",
    }
    for name, numbers in counts.items():
        (tmp_path / "data.json").write_text(json.dumps([cases[name]]))
        dataset = ConversationDataset(load_mixture([{"annotations": tmp_path / "data.json"}]), processor)
        with pytest.raises(ValueError, match=f"record 0: {numbers} image"):
            dataset[0]


def test_a_mark_in_a_record_without_images_is_spelled_like_the_original(golden, tmp_path, processor):
    cases = json.loads((golden / "tokenization.json").read_text(encoding="utf-8"))["cases"]
    case = next(case for case in cases if case["name"] == "mark_but_no_image_key")
    result = next(result for result in case["results"] if not result["legacy"])
    for name, empty in enumerate(({}, {"image": None}, {"image": []}, {"images": []}, {"video": None})):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([case["sample"] | empty]))
        dataset = ConversationDataset(load_mixture([{"annotations": file}]), processor, "vicuna_v1")
        sample = pickle.loads(pickle.dumps(dataset))[0]
        assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == (result["input_ids"], result["labels"])
        assert dataset.modality_lengths[0] < 0 and "pixel_values" not in sample


@pytest.mark.parametrize(
    "question", ["<image>", "Is <image> an <image><image>?", "a <IMAGE> </s><image>\n", "x<image>"]
)
def test_no_spelled_mark_is_a_placeholder(world, make_record, question):
    dataset = world([make_record(question, f"{question} it is")])
    ids = dataset[0]["input_ids"]
    assert dataset.processor.image_token_id not in ids and question.strip() in dataset.processor.tokenizer.decode(ids)
    assert preview.marked_text(dataset, 0).count("<image>") == 2 * question.count("<image>")


def test_images_is_read_as_image_is(world, make_record):
    turns = make_record("Compare <image> and <image>", "Same.")["conversations"]
    names = ["a.png", "b.png"]
    forms = [{"image": names}, {"images": names}, {"image": [], "images": names}, {"image": names, "images": names}]
    dataset = world([{"id": "x", "conversations": turns, **form} for form in forms])
    first = dataset[0]
    assert dataset.modality_lengths == [dataset.modality_lengths[0]] * 4 and dataset.modality_lengths[0] > 0
    for sample in dataset:
        assert all(torch.equal(sample[key], first[key]) for key in first) and first.keys() == sample.keys()


def test_constructor_checks(world, make_record, processor):
    with pytest.raises(ValueError, match="on_bad_sample is 'ignore'; expected 'fail' or 'skip'"):
        world([make_record("a", "b")], on_bad_sample="ignore")
    with pytest.raises(ValueError, match="skipped_path must name the file"):
        world([make_record("a", "b")], on_bad_sample="skip")
    with pytest.raises(ValueError, match="unknown conversation template 'v9'"):
        world([make_record("a", "b")], conversation_template="v9")
    with pytest.raises(ValueError, match=r"sources is \[\]; expected a list of .*at least one"):
        ConversationDataset([], processor)


def test_split_keeps_each_record_on_one_side(world, make_record):
    dataset = world([make_record(f"q{i}", "a") for i in range(20)], weight=2)
    train, validation = dataset.split(0.25, seed=3)
    sides = [{part.origin(i) for i in range(len(part))} for part in (train, validation)]
    assert len(validation) == 5 and len(train) == 30 and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20
    again = dataset.split(0.25, seed=3)[1]
    assert [again.origin(i) for i in range(5)] == [validation.origin(i) for i in range(5)]
    assert validation[0].keys() == {"input_ids", "labels"} and len(train.lengths) == 30
    for fraction in (0, 1, 0.01):
        with pytest.raises(ValueError, match="validation fraction"):
            dataset.split(fraction)


def test_distinct(world, make_record):
    dataset = world([make_record(f"q{i}", "a") for i in range(4)], weight=2.5)
    assert len(dataset) == 10 and len(dataset.distinct()) == 4
