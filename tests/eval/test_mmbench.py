"""MMBench: circular scores by every rule, prompts, the table for the server, and bad tables."""

from __future__ import annotations

import base64
import json
import random
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from llava_sp.eval.cli import main
from llava_sp.eval.mmbench import ABILITIES, MMBench
from tests.eval.commands import command_of

RECORDING = "mmbench"

TABLE = "mmbench_dev.tsv"
SCORERS = {
    "vlmevalkit": "vlmevalkit_head.exact_matching",
    "vlmevalkit_v0.2": "vlmevalkit_v0.2.exact_matching",
    "lmms_eval": "lmms_eval",
}
HEADER = "index question hint A B C D answer category image source l2-category comment split".split()  # noqa: SIM905
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGOce8OGgYGBiYGBgYGBAQAU1wG1aBeXFgAAAABJRU5ErkJggg=="


run = command_of(MMBench)


def read_table(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()]


def write_table(file: Path, rows: list[list[str]]) -> None:
    file.write_text("".join("\t".join(row) + "\n" for row in rows))


def change(data: Path, line: int, **values: str) -> None:
    """Edits the fields of a line (1 is the header)."""
    rows = read_table(data / TABLE)
    for name, value in values.items():
        rows[line - 1][rows[0].index(name.replace("l2_", "l2-"))] = value
    write_table(data / TABLE, rows)


def made(folder: Path, *rows: dict[str, str], name: str = TABLE) -> Path:
    """A folder with a table of these rows, each with two options and a picture unless it says otherwise."""
    folder.mkdir(exist_ok=True)
    usual = {"question": "Which?", "A": "cat", "B": "dog", "image": PICTURE, "split": "dev"}
    write_table(folder / name, [HEADER, *([{**usual, **row}.get(column, "") for column in HEADER] for row in rows)])
    return folder


def loaded(folder: Path, **arguments: str):
    return MMBench(**arguments).load(folder)


@pytest.mark.parametrize("protocol", SCORERS)
def test_scores_equal_those_of_other_programs(tmp_path, data, answers, recorded, capsys, protocol):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol)
    expected = recorded["expected"][SCORERS[protocol]]
    result = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    check_scores(result, lines, expected)
    assert status == 0 and f"{result['score']} (12 questions)" in out
    assert MMBench.headline(lines) == result["score"]


def check_scores(result: dict, lines: list[dict], expected: dict) -> None:
    aggregate = expected["aggregate"]
    if "overall" in aggregate:  # lmms-eval
        abilities = {ABILITIES[name]: value for name, value in aggregate["l2"].items()}
        overall, categories = aggregate["overall"], aggregate["category"]
    else:
        overall = aggregate["Overall"]
        abilities = {name: aggregate[name] for name in ABILITIES.values()}
        categories = {name: v for name, v in aggregate.items() if name != "Overall" and name not in abilities}
    percents = {name: round(100 * value, 2) for name, value in (abilities | categories).items()}
    assert result["score"] == round(100 * overall, 2)
    assert result["metrics"]["by_ability"] | result["metrics"]["by_category"] == percents
    assert {name: figures["score"] for name, figures in result["categories"].items()}.items() <= percents.items()
    assert list(result["categories"]) == list(ABILITIES.values())
    hits: dict[str, int] = {}
    for line in lines:
        hits[str(line["unit"])] = min(hits.get(str(line["unit"]), 1), int(line["score"] == 100))
        if "overall" not in aggregate:
            assert line["answer"] == expected["per_row_inferred"][str(line["question_id"])]
    assert hits == expected.get("per_group_hit", hits)


def test_plain_equality_is_llavas_rule(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    result = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    right = {item["id"]: item["raw"].strip() == item["gold"] for item in recorded["items"]}
    groups = {item["group"] for item in recorded["items"]}
    hits = {g: all(ok for i, ok in right.items() if i % 1_000_000 == g) for g in groups}
    assert {line["question_id"]: line["score"] == 100 for line in lines} == right
    assert result["score"] == round(100 * sum(hits.values()) / len(hits), 2) == MMBench.headline(lines)
    metrics = result["metrics"]
    assert metrics["questions"] == 12 and metrics["rows"] == 40
    assert metrics["accuracy_of_rows"] == round(100 * sum(right.values()) / 40, 2)
    assert result["scored_as"] == {"llava15": result["score"], **dict.fromkeys(SCORERS, 58.33)}


def test_headline_of_a_resample():
    def question(unit: int, *scores: float) -> list[dict]:
        return [{"unit": unit, "question_id": unit + k * 1_000_000, "score": s} for k, s in enumerate(scores)]

    right, wrong = question(1, 100.0, 100.0), question(2, 100.0, 0.0, 100.0)
    assert MMBench.headline([*right, *wrong]) == 50.0
    assert MMBench.headline([*right, *right, *wrong]) == 66.67
    assert MMBench.headline([*wrong, *right, *wrong, *wrong]) == 25.0
    assert MMBench.headline(right) == 100.0


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["mmbench"]
    generation = asdict(MMBench.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    benchmark = MMBench()
    items = {item.id: item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[int(case["question_record"]["index"])]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert list(record) == list(case["answer_record_without_answer_id"])
        assert f"USER: {benchmark.message(item)} ASSISTANT:" in case["prompt"]


def test_pictures_come_out_of_the_table_once(tmp_path, data):
    assert all(image.startswith(b"\x89PNG") for item in loaded(data) for image in item.images)
    rows = ({"index": index, "answer": "A"} for index in ("1", "1000001", "2", "1000002"))
    images = [item.images[0] for item in loaded(made(tmp_path / "made", *rows))]
    assert all(image is images[0] for image in images)  # so that they are computed once


def test_lmms_evals_prompt(data):
    benchmark = MMBench(protocol="lmms_eval")
    first, second = benchmark.load(data)[:2]
    options = (
        "There are several options:\nA. red barrel\nB. new thimble\nC. red anvil\n\nAnswer with the option's letter"
    )
    asked = f"Note 0: look closely. Which thing stands out in picture 0? {options} from the given choices directly."
    assert benchmark.prompt(first) == benchmark.record(first)["prompt"] == asked
    assert benchmark.prompt(second).startswith("Which thing stands out in picture 1? There are several options:\nA. ")


def test_other_protocols_have_their_own_length():
    lengths = {protocol: MMBench(protocol=protocol).generation.max_new_tokens for protocol in MMBench.protocols}
    assert lengths == {"llava15": 1024, "vlmevalkit": 512, "vlmevalkit_v0.2": 512, "lmms_eval": 1024}


def test_vlmevalkit_searches_an_empty_answer_as_nan(tmp_path):
    item = loaded(made(tmp_path / "data", {"index": "1", "A": "an", "B": "dog", "answer": "A"}))[0]
    scores = {
        text: {p: MMBench(protocol=p).infer(text, item.metadata["options"]) for p in MMBench.protocols}
        for text in ("", "None", "a big banana")
    }
    assert (
        scores[""] == scores["None"] == {"llava15": None, "vlmevalkit": "A", "vlmevalkit_v0.2": "A", "lmms_eval": None}
    )
    assert (
        scores["a big banana"]["vlmevalkit"] is None and scores["a big banana"]["vlmevalkit_v0.2"] == "A"
    )  # too long today


def test_missing_options_and_hints(tmp_path):
    row = {"index": "1", "hint": "NaN", "C": "None", "D": "cow", "answer": "D"}
    benchmark = MMBench()
    item = benchmark.load(made(tmp_path / "data", row))[0]
    assert item.text == "Which?\nA. cat\nB. dog" and item.metadata["hint"] == ""  # LLaVA's list ends at the gap
    assert item.metadata["options"] == {"A": "cat", "B": "dog", "D": "cow"}  # an inferred letter may still be D
    assert benchmark.record(item)["option_char"] == ["A", "B"]


@pytest.mark.parametrize("text", ["none", "NONE", "NAN", "Nan"])
def test_what_llava_alone_takes_for_missing(tmp_path, text):
    """pandas reads "None", "nan" and "NaN" as missing, in no other case; LLaVA passes over these in any case."""
    row = {"index": "1", "hint": text, "C": "cow", "D": text, "answer": "D"}
    options = ["A. cat", "B. dog", "C. cow", f"D. {text}"]
    asked = {
        "llava15": "\n".join(["Which?", *options[:3]]),
        "vlmevalkit": "\n".join([text, "Which?", *options]),
        "vlmevalkit_v0.2": "\n".join([text, "Which?", *options]),
        "lmms_eval": "\n".join([f"{text} Which? There are several options:", *options]),
    }
    for protocol, prompt in asked.items():
        benchmark = MMBench(protocol=protocol)
        item = benchmark.load(made(tmp_path / "data", row))[0]
        assert benchmark.prompt(item).startswith(f"{prompt}\n") and benchmark.prompt(item).count("\nD.") == (
            protocol != "llava15"
        )
        assert benchmark.record(item)["option_char"] == list("ABCD")[: 3 if protocol == "llava15" else 4]
        assert benchmark.score([item], ["D"]).score == 100.0
    assert MMBench(protocol="vlmevalkit").infer(f"It is {text}", item.metadata["options"]) == "D"


def test_missing_is_what_pandas_takes_for_it(tmp_path):
    """As read_csv of pandas 3.1.1 does, with either parser."""
    missing = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
    kept = "none|NONE|NAN|Nan|Null|na|-NAN|NuLL|<na>|N/a|-Nan|Na| NA|NA "
    rows = [{"index": str(i), "C": t, "answer": "A"} for i, t in enumerate([*missing.split("|"), *kept.split("|")])]
    found = ["C" in item.metadata["options"] for item in loaded(made(tmp_path / "data", *rows))]
    assert found == [False] * 18 + [True] * 14


def test_rotations_are_those_of_options_that_count(tmp_path):
    """Tables that other programs wrote have "nan" in empty fields."""
    rows = [{"index": i, "C": "nan", "D": "nan", "answer": a} for i, a in (("1", "A"), ("1000001", "B"))]
    assert len(loaded(made(tmp_path / "data", *rows))) == 2


def test_pictures_of_other_rows_and_line_breaks(tmp_path):
    rows = [{"index": "1", "answer": "A"}, {"index": "1000001", "answer": "B", "image": "1"}]
    items = loaded(made(tmp_path / "data", *rows))
    assert items[1].images == items[0].images == (base64.b64decode(PICTURE),)
    (tmp_path / "data" / TABLE).write_text(
        (tmp_path / "data" / TABLE).read_text().replace("Which?", '"Which\n""one""?"')
    )
    assert loaded(tmp_path / "data")[1].metadata["question"] == 'Which\n"one"?'


def test_splits_are_files(tmp_path, data, capsys):
    assert loaded(data)[0].reference == "A"
    with pytest.raises(
        ValueError, match="has no test table of mmbench: looked for mmbench_test_20230712.tsv, MMBench_TEST_EN"
    ):
        loaded(data, split="test")
    benchmark = MMBench()
    items = benchmark.load(made(tmp_path / "other", {"index": "1"}, name="MMBench_TEST_EN.tsv"))
    assert benchmark.split == "test" and items[0].reference is None


def test_the_first_table_named_in_the_docstring_is_taken(data):
    made(data, {"index": "7", "answer": "A"}, name="mmbench_dev_20230712.tsv")
    assert [item.id for item in loaded(data)] == [7]


def sheet(file: Path) -> list[tuple]:
    openpyxl = pytest.importorskip("openpyxl")
    return list(openpyxl.load_workbook(file).active.iter_rows(values_only=True))


def test_table_for_the_server_equals_llavas(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output)
    expected = recorded["expected"]["llava_convert"]
    header, *rows = sheet(output / "submission.xlsx")
    assert status == 0 and f"to submit:    {output / 'submission.xlsx'}" in out
    assert list(header) == expected["columns"] and len(rows) == expected["rows"]
    assert {str(row[0]): row[6] or "" for row in rows} == expected["prediction"]
    assert rows[0][:5] == (100, "Which thing stands out in picture 0?", "red barrel", "new thimble", "red anvil")
    assert rows[0][5:] == (None, "A", "A", "dev")
    status, out, _ = run(capsys, "--validate", output / "submission.xlsx", "--data", data)
    assert status == 0 and "answers all 40 rows of mmbench dev once (1 of them empty)" in out
    assert not list(output.glob("*.tmp*"))


def test_every_answer_survives_as_text(tmp_path, capsys):
    texts = ["=1+1", "nan", "NA", "None", "#N/A", "1", "a\x0bb", "", "A\nB", "TRUE", "2020-01-01", "  A"]
    folder = made(
        tmp_path / "data", *({"index": str(i), "A": "=x", "B": "3"} for i in range(12)), name="mmbench_test.tsv"
    )
    lines = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", folder / "a.jsonl", "--data", folder, "--output", output)
    header, *rows = sheet(output / "submission.xlsx")
    assert status == 0 and "12 questions answered; only the MMBench server can score them" in out
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [row[6] or "" for row in rows] == [text.replace("\x0b", " ") for text in texts]
    assert all(row[2:4] == ("=x", "3") for row in rows)
    assert json.loads((output / "metrics.json").read_text())["score"] is None
    per_item = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert per_item[5]["text"] == "1" and "score" not in per_item[5] and per_item[5]["references"] == []
    status, out, _ = run(capsys, "--validate", output / "submission.xlsx", "--data", folder)
    assert status == 0 and "answers all 12 rows of mmbench test once (1 of them empty)" in out


def test_a_table_without_an_answer_column(tmp_path, capsys):
    folder = made(tmp_path / "data", {"index": "1"}, name="mmbench_test.tsv")
    rows = read_table(folder / "mmbench_test.tsv")
    write_table(folder / "mmbench_test.tsv", [[v for name, v in zip(HEADER, row) if name != "answer"] for row in rows])
    (folder / "a.jsonl").write_text('{"question_id": 1, "text": "A"}\n')
    assert run(capsys, "--answers", folder / "a.jsonl", "--data", folder, "--output", tmp_path / "out")[0] == 0
    assert sheet(tmp_path / "out" / "submission.xlsx")[0][-3:] == ("D", "prediction", "split")


def test_without_openpyxl(tmp_path, data, answers, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")
    assert status == 0 and "note: no submission.xlsx for the server" in err and "pip install llava_sp[eval]" in err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["score"] is not None
    folder = made(tmp_path / "test", {"index": "1"}, name="mmbench_test.tsv")
    with pytest.raises(ValueError, match=r"pip install llava_sp\[eval\]"):  # said before anything is answered
        loaded(folder)
    status, _, err = run(capsys, "--validate", tmp_path / "x.xlsx", "--data", data)
    assert status == 1 and "pip install llava_sp[eval]" in err


@pytest.fixture
def submission(tmp_path, data, answers, capsys):
    """`submission(edit)`: a good submission file after `edit(sheet)`."""
    openpyxl = pytest.importorskip("openpyxl")
    run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")

    def make(edit) -> Path:
        book = openpyxl.load_workbook(tmp_path / "out" / "submission.xlsx")
        edit(book.active)
        book.save(tmp_path / "edited.xlsx")
        return tmp_path / "edited.xlsx"

    return make


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.delete_rows(2, 2), "no answer: 2 (100, 107)"),
        (lambda s: s.append([7, "?", "a", "b"]), "answer to a question that is not in the file: 1 (7)"),
        (lambda s: s.append([100, "?", "a", "b"]), "more than one answer: 1 (100)"),
        (
            lambda s: s.delete_cols(7),
            "edited.xlsx, row 2 has no prediction; it has index, question, A, B, C, D, answer, split",
        ),
        (
            lambda s: s.__setitem__("B3", "Another?"),
            "another question than in the data: 1 (107); 107 has 'Another?'",
        ),
        (lambda s: s.__setitem__("G3", "=1+1"), "edited.xlsx, row 3: '=1+1' is a formula"),
        (lambda s: s.__setitem__("A3", "x"), "edited.xlsx, row 3: index is 'x'"),
        (
            lambda s: s.delete_cols(3),
            "it has no column A, but index, question, B, C, D, prediction, answer, split",
        ),
        (lambda s: s.delete_cols(6), "has no column D"),
        (lambda s: s.delete_cols(8), "has no column answer"),
        (lambda s: s.delete_cols(9), "has no column split"),
        (lambda s: s.__setitem__("J1", "prediction"), "has more than one column prediction"),
        (lambda s: s.__setitem__("D4", "changed"), "another B than in the data: 1 (114); 114 has 'changed'"),
        (lambda s: s.__setitem__("D4", 5), "another B than in the data: 1 (114); 114 has '5'"),
        (lambda s: s.__setitem__("F2", "fourth"), "another D than in the data: 1 (100); 100 has 'fourth'"),
        (lambda s: s.__setitem__("C3", None), "another A than in the data: 1 (107); 107 has 'None'"),
        (lambda s: s.__setitem__("H3", "D"), "another answer than in the data: 1 (107); 107 has 'D'"),
        (lambda s: s.__setitem__("I3", "test"), "another split than in the data: 1 (107); 107 has 'test'"),
        (lambda s: s.__setitem__("G3", 5), "edited.xlsx, row 3: prediction is 5"),
        (lambda s: s.__setitem__("G3", True), "edited.xlsx, row 3: prediction is True"),
        (lambda s: s.__setitem__("A3", True), "edited.xlsx, row 3: index is True"),
        (lambda s: s.delete_rows(2, 99), "has no rows below its header"),
        (lambda s: s.delete_rows(1, 99), "has no rows below its header"),
    ],
)
def test_validator_says_what_is_wrong(data, submission, capsys, edit, message):
    status, _, err = run(capsys, "--validate", submission(edit), "--data", data)
    assert status == 1 and err.startswith("not valid: ") and message in err


def test_validator_finds_the_split(data, submission, capsys):
    made(data, {"index": "7"}, name="mmbench_test.tsv")
    file = submission(lambda sheet: None)
    assert "40 rows of mmbench dev" in run(capsys, "--validate", file, "--data", data)[1]
    status, _, err = run(capsys, "--validate", file, "--data", data, "--split", "test")
    assert status == 1 and "(as rows of mmbench test)" in err and "mmbench dev" not in err
    status, _, err = run(capsys, "--validate", submission(lambda s: s.delete_rows(2)), "--data", data)
    assert status == 1 and "no answer: 1 (100) (as rows of mmbench dev); " in err


def test_validator_of_another_kind_of_file(tmp_path, data, capsys):
    openpyxl = pytest.importorskip("openpyxl")
    for name in ("x.xlsx", "x.json"):
        (tmp_path / name).write_text("[]")
        status, _, err = run(capsys, "--validate", tmp_path / name, "--data", data)
        assert status == 1 and "is not an .xlsx table" in err
    book = openpyxl.Workbook()
    book.create_chartsheet()
    book.remove(book.worksheets[0])
    book.save(tmp_path / "chart.xlsx")
    status, _, err = run(capsys, "--validate", tmp_path / "chart.xlsx", "--data", data)
    assert status == 1 and "chart.xlsx is not an .xlsx table, or is damaged (" in err
    status, _, err = run(capsys, "--validate", tmp_path / "absent.xlsx", "--data", data)
    assert status == 1 and "absent.xlsx does not exist" in err


def test_damaged_tables_are_told(data, submission, capsys):
    """One byte or a few changed, or the end lost: in the archive, and within the texts that it holds."""
    file = submission(lambda sheet: None)
    whole, rng = file.read_bytes(), random.Random(0)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for number in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(content if number % 5 else whole[: rng.randrange(1, len(whole))])
        assert main(MMBench, ["--validate", str(file), "--data", str(data)]) in (0, 1)
        name = rng.choice(list(parts))
        text = bytearray(parts[name])
        start = rng.randrange(len(text))
        text[start : start + rng.choice((1, 20, len(text)))] = rng.choice((b"", b"x", b"<"))
        with zipfile.ZipFile(file, "w") as archive:
            for part, kept in parts.items():
                archive.writestr(part, bytes(text) if part == name else kept)
        assert main(MMBench, ["--validate", str(file), "--data", str(data)]) in (0, 1)
    err = capsys.readouterr().err
    assert err.count("or is damaged") > 150 and "Error -3 while decompressing" in err


def test_options_that_other_programs_made_numbers_of(tmp_path, capsys):
    openpyxl = pytest.importorskip("openpyxl")
    folder = made(tmp_path / "data", {"index": "1", "A": "3", "B": "4", "C": "none", "answer": "B"})
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    book = openpyxl.Workbook()
    for row in (columns, [1, "Which?", 3, 4.0, "none", None, None, "B", "dev"]):
        book.active.append(row)
    book.save(tmp_path / "made.xlsx")
    status, out, _ = run(capsys, "--validate", tmp_path / "made.xlsx", "--data", folder)
    assert status == 0 and "answers all 1 rows of mmbench dev once (1 of them empty)" in out


@pytest.mark.parametrize(
    "line, values, message",
    [
        (3, {"index": "x"}, "mmbench_dev.tsv, line 3: index is 'x'"),
        (3, {"index": "100"}, "more than one record with the same index: 100 (100: line 2, line 3)"),
        (3, {"answer": "E"}, "mmbench_dev.tsv, line 3 (index 107): answer is 'E'; its options are A, B, C"),
        (3, {"answer": ""}, "1 of 40 rows have no answer (index 107)"),
        (
            3,
            {"image": PICTURE[:-1]},
            "mmbench_dev.tsv, line 3: image is 'iVBORw0KGgoAAAANSUhE'..., not an image in base64 (Incorrect padding)",
        ),
        (
            3,
            {"image": "*" * 70},
            "mmbench_dev.tsv, line 3: image is '********************'..., not an image in base64 (Only base64 data is allow",
        ),
        (3, {"image": "12"}, "mmbench_dev.tsv, line 3: image is '12'..., not an image in base64 (Incorrect padding)"),
        (3, {"image": ""}, "mmbench_dev.tsv, line 3: image is ''..., not an image in base64 (its format is not known)"),
        (
            3,
            {"image": base64.b64encode(b"no picture at all " * 4).decode()},
            "mmbench_dev.tsv, line 3: image is 'bm8gcGljdHVyZSBhdCBh'..., not an image in base64 (its format is not known)",
        ),
        (3, {"answer": "D"}, "mmbench_dev.tsv, line 3 (index 107): answer is 'D'; its options are A, B, C"),
        (
            3,
            {"A": "", "B": "nan", "C": "", "D": ""},
            "mmbench_dev.tsv, line 3 (index 107): answer is 'A'; its options are empty",
        ),
        (
            2,
            {"D": "fourth"},
            "not one row for each rotation of the options: 1 question (100): an interrupted download or copy?",
        ),
        (
            2,
            {"index": "5000100"},
            "not one row for each rotation of the options: 1 question (100): an interrupted download or copy?",
        ),
    ],
)
def test_wrong_fields_are_named(data, answers, capsys, line, values, message):
    change(data, line, **values)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and TABLE in err and message in err


def test_each_picture_is_looked_at_once(tmp_path, monkeypatch):
    rows = [{"index": str(i), "answer": "A"} for i in range(50)]
    rows.append({"index": "50", "answer": "A", "image": base64.b64encode(base64.b64decode(PICTURE) + b" ").decode()})
    opened = []
    monkeypatch.setattr(Image, "open", lambda stream, whole=Image.open: opened.append(stream) or whole(stream))
    assert len(loaded(made(tmp_path / "data", *rows))) == 51 and len(opened) == 2


def test_tables_cut_off_are_told(data, answers, capsys):
    text = (data / TABLE).read_text()
    (data / TABLE).write_text(text[:-60])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"{TABLE}, line 41 has 10 fields, not 14" in err
    (data / TABLE).write_text("\n".join(text.splitlines()[:-3]) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "rotation of the options: 3 questions (128, 135, 163)" in err
    (data / TABLE).write_text("index\tquestion\n1\tWhich?\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "line 2 has no A, B, image; it has index, question" in err


def test_answers_must_fit(data, answers, capsys):
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join([*lines[2:], lines[5], '{"question_id": 7, "text": "A"}']) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2
    for part in ("(100, 107)", "(135)", "mmbench dev"):
        assert part in err
