"""MMBench (Liu et al. 2023): questions with two to four options, each asked in every rotation of its options.

    python -m llava_sp.eval.mmbench --model M --data D --output O [--split dev|test]

D holds (in D itself or one folder below) the table mmbench_dev_20230712.tsv, or mmbench_test_20230712.tsv, with the
pictures in it; the newer MMBench_DEV_EN.tsv and MMBench_TEST_EN.tsv are read too. The Chinese tables are asked by
`python -m llava_sp.eval.mmbench_cn`. Rows whose index differs by a multiple of 1,000,000 are the rotations of one
question; it counts as right only if every one of them is, and the headline is the percentage of questions that are.

Published for LLaVA-1.5-7B: 64.3, on the dev table of 2023-07-12 with 1176 questions in 4377 rows. MMBench_DEV_EN.tsv
has 1164 questions: its figure is another one.

Protocols: `llava15` counts an answer that is the letter and nothing else (surrounding spaces aside). No code of LLaVA
scores MMBench, a server does; of LLaVA-1.5-13B's released answers this rule gives 67.69, published is 67.7.
`vlmevalkit` and `vlmevalkit_v0.2` infer letters as exact matching in VLMEvalKit does today and did then; its table of
answers turns an empty answer, and answers like NA or None, into the text "nan", which is then searched for the
options' texts. It asks LLaVA models with the same words (but for all options, see below), up to 512 tokens. `lmms_eval`
infers letters as lmms-eval's static MMBench does, and asks with its own prompt. An answer of which no letter can be inferred
is wrong under all of them (where these programs would ask a judge model, or draw at random).

O/submission.xlsx is the file for the MMBench server, for dev and test (its answers are secret); it needs
`pip install llava_sp[eval]`. LLaVA's converter loses answers that begin with "=" to a formula; here every answer is
written as text. `--validate O/submission.xlsx` checks one: its columns, one row per row of the data with the same
question, options, answer and split, and predictions that are text.

An option or hint is absent where it is empty or what pandas reads as missing ("nan", "NaN", "NA", "None", "null", ..., in
just these cases). LLaVA takes "nan" and "none" in any case for missing too, and ends its list of options at the first that
is: an option "none" is not shown under `llava15`, and is one like any other under the other protocols. An answer whose
letter has no option is an error, and so is a picture that is none.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from zipfile import BadZipFile

from PIL import Image, UnidentifiedImageError

from llava_sp.common.files import Line, examples, read_bytes
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, OPTION_LETTER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import compare_ids, expect_once, find
from llava_sp.eval.scoring.letters import lettered, lmms_mmbench, percent, vlmevalkit

ROTATION = 1_000_000
ABILITIES = {  # in the order of the leaderboard
    "logic_reasoning": "LR",
    "attribute_reasoning": "AR",
    "relation_reasoning": "RR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "coarse_perception": "CP",
}
_COLUMNS = ("index", "question", "A", "B", "image")
_UPLOADED = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
_SMALLEST_IMAGE = 64  # a shorter field is the index of the row that has the picture (VLMEvalKit's tables)
_MISSING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)  # fmt: skip - what pandas takes for missing, in just these cases
_LLAVA_MISSING = ("nan", "none")  # what LLaVA takes for missing besides, in any case
_NO_CELL = re.compile(r"[\000-\010\013\014\016-\037]")  # characters that a table cannot hold


class MMBench(Benchmark):
    name = "mmbench"
    title = "MMBench accuracy in percent, all rotations right"
    splits = ("dev", "test")
    protocols = ("llava15", "vlmevalkit", "vlmevalkit_v0.2", "lmms_eval")
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = dict.fromkeys(("vlmevalkit", "vlmevalkit_v0.2"), Generation(max_new_tokens=512))
    published: ClassVar = {LLAVA15: 64.3, LLAVA15_LORA: 66.1}
    published_on = "dev of 2023-07-12, 1176 questions"
    unscored = "only the MMBench server can score them"
    tables: ClassVar = {
        "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev.tsv"),
        "test": ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv", "mmbench_test.tsv"),
    }
    letter_suffix = OPTION_LETTER
    lmms_suffix = "\n\nAnswer with the option's letter from the given choices directly."

    def load(self, data: Path) -> list[Item]:
        splits = self.splits if self.split is None else (self.split,)
        found = [(split, path) for split in splits for path in find(data, *self.tables[split])]
        if not found:
            names = (name for split in splits for name in self.tables[split])
            raise ValueError(f"{data} has no table of {self.name}: looked for {', '.join(names)}")
        self.split, file = found[0]
        rows = [(row.number, row) for row in self.read_table(file, "\t")]
        items = _items(rows, file)
        if items[0].reference is None:
            _openpyxl()  # before hours of answering: without the table for the server they would be for nothing
        return items

    def prompt(self, item: Item) -> str:
        return self._asked(item) + (self.lmms_suffix if self.protocol == "lmms_eval" else self.letter_suffix)

    def _asked(self, item: Item) -> str:
        """The prompt without its last sentence."""
        if self.protocol == "llava15":
            return item.text
        hint, question = item.metadata["hint"], item.metadata["question"]
        options = lettered(item.metadata["options"])
        if self.protocol == "lmms_eval":
            introduced = f"{hint} {question}" if hint else question
            return f"{introduced} There are several options:\n{options}"
        return _joined(hint, question, options)

    def record(self, item: Item) -> dict[str, Any]:
        options = item.metadata["options"]
        options = _shown(options) if self.protocol == "llava15" else options
        prompt = self.prompt(item) if self.protocol == "lmms_eval" else self._asked(item)  # so does LLaVA's line
        record = {"question_id": item.id, "round_id": 0, "prompt": prompt, "text": ""}  # the answer's place among them
        return {**record, "options": list(options.values()), "option_char": list(options)}

    def infer(self, text: str, options: Mapping[str, str]) -> str | None:
        """The letter that an answer means by the rule of the protocol."""
        if self.protocol == "lmms_eval":
            return lmms_mmbench(text.strip(), options)
        if self.protocol.startswith("vlmevalkit"):
            version = self.protocol.partition("_")[2] or "head"
            return vlmevalkit("nan" if _is_missing(text) else text, options, version=version)
        return text.strip() if text.strip() in tuple("ABCD") else None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            letter = self.infer(text, item.metadata["options"])
            record = {"question_id": item.id}
            if item.reference is not None:
                record["score"] = 100.0 if letter == item.reference else 0.0
            record |= {"answer": letter, "text": text, "image": None}  # it is in the table
            record["references"] = [] if item.reference is None else [item.reference]
            per_item.append(record | {key: value for key, value in item.metadata.items() if key != "row"})
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        right = _right(per_item)
        main_rows = {record["unit"]: record for record in reversed(per_item)}  # the first of its rows says what it is
        groups = {key: _percent_by(key, main_rows, right) for key in ("l2_category", "category")}
        by_ability = {ABILITIES.get(name, name): figures for name, figures in groups["l2_category"].items()}
        order = [name for name in ABILITIES.values() if name in by_ability]
        order += sorted(set(by_ability).difference(order))
        metrics = {
            "questions": len(right),
            "rows": len(per_item),
            "accuracy_of_rows": percent(sum(record["score"] > 0 for record in per_item), len(per_item)),
            "not_understood": sum(record["answer"] is None for record in per_item),
            "by_ability": {name: by_ability[name].score for name in order},
            "by_category": {name: figures.score for name, figures in sorted(groups["category"].items())},
        }
        categories = {name: by_ability[name] for name in order}
        return Scores(self.headline(per_item), metrics, per_item, categories, count=len(right))

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """Percent of questions with all rotations right; one whose rotations are there n times counts n times."""
        right = _right(per_item)
        rotations = defaultdict(set)
        counts: dict[int, int] = defaultdict(int)
        for record in per_item:
            rotations[record["unit"]].add(record["question_id"])
            counts[record["unit"]] += 1
        times = {unit: counts[unit] // len(rotations[unit]) for unit in counts}
        return percent(sum(times[unit] * right[unit] for unit in times), sum(times.values()))

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / "submission.xlsx"
        try:
            _write_xlsx(path, items, answers)
        except _NotInstalled as error:
            if items[0].reference is None:
                raise
            print(f"note: no {path.name} for the server: {error}", file=sys.stderr)
            return None
        return path

    def validate(self, file: Path, data: Path) -> str:
        there = [split for split in self.splits if find(data, *self.tables[split])]
        splits = there if self.split is None and there else [self.split]
        rows = _read_xlsx(file)
        problems = []
        for split in splits:
            items = type(self)(split).load(data)
            trouble = _misfits(rows, items)
            if not trouble:
                empty = sum(row["prediction"] in (None, "") for row in rows)
                return f"{file} answers all {len(items)} rows of {self.name} {split} once ({empty} answers are empty)"
            problems.append(f"as {split}: {trouble}")
        raise ValueError(f"{file} " + "; ".join(problems))


def _columns(items: Sequence[Item]) -> list[str]:
    """The columns of a submission: those that the data have of `_UPLOADED`, and the prediction."""
    return [name for name in _UPLOADED if name == "prediction" or name in items[0].metadata["row"]]


def _misfits(rows: list[dict[str, Any]], items: Sequence[Item]) -> str:
    """What in a submission does not fit the questions; empty if all does."""
    trouble = compare_ids([row["index"] for row in rows], [item.id for item in items])
    if trouble:
        return trouble
    absent = [name for name in _columns(items) if name not in rows[0]]
    if absent:
        return f"has no column {', '.join(absent)}; it has {', '.join(rows[0])}"
    submitted = {row["index"]: row for row in rows}
    for name in _columns(items):
        if name not in ("index", "prediction"):
            differing = [i.id for i in items if not _is_same(submitted[i.id][name], i.metadata["row"][name])]
            if differing:
                return (
                    f"{len(differing)} rows have another {name} than the data ({examples(differing)}): {differing[0]} has "
                    f"{str(submitted[differing[0]][name])[:60]!r}"
                )
    wrong = [row for row in rows if not isinstance(row["prediction"], (str, type(None)))]
    if wrong:
        return (
            f"{len(wrong)} predictions are no text ({examples(row['index'] for row in wrong)}): {wrong[0]['index']} has "
            f"{wrong[0]['prediction']!r}"
        )
    return ""


def _is_same(cell: object, text: str) -> bool:
    """Whether a cell says what the data say, spaces aside. pandas makes numbers of some options and empties missing ones."""
    if isinstance(cell, (int, float)):
        try:
            return float(text) == cell
        except ValueError:
            return str(cell) == text
    return _words("" if cell is None else str(cell)) == _words(text)


def _words(text: str) -> list[str]:
    return [] if _is_missing(text) else _NO_CELL.sub(" ", text).split()


def _items(rows: list[tuple[int, dict[str, str]]], file: Path) -> list[Item]:
    absent = [column for column in _COLUMNS if column not in rows[0][1]]
    if absent:
        raise ValueError(f"{file} has no column {', '.join(absent)}; it has {', '.join(rows[0][1])}")
    for line, row in rows:
        if not row["index"].isdecimal():
            raise ValueError(f"{file}, line {line}: index is {row['index'][:60]!r}, not a whole number")
    expect_once((_index(line, row) for line, row in rows), file, "index number", key="index")
    _check_rotations(rows, file)
    pictures = {row["index"]: row["image"] for _, row in rows}
    decoded: dict[str, bytes] = {}  # equal pictures are one object, so that their rows share its computation
    items = []
    for line, row in rows:
        where = f"{file}, line {line}"
        encoded = row["image"]
        if len(encoded) < _SMALLEST_IMAGE and encoded in pictures:
            encoded = pictures[encoded]
        if encoded not in decoded:
            decoded[encoded] = _decode(encoded, where)
        items.append(_item(row, decoded[encoded], where))
    answered = [item for item in items if item.reference is not None]
    if answered and len(answered) < len(items):
        lost = next(item for item in items if item.reference is None)
        raise ValueError(f"{file}: {len(items) - len(answered)} rows have no answer, the first with index {lost.id}")
    return items


def _index(line: int, row: Mapping[str, str]) -> Line:
    record = Line(index=int(row["index"]))
    record.number = line
    return record


def _item(row: Mapping[str, str], picture: bytes, where: str) -> Item:
    options = {letter: row[letter] for letter in "ABCD" if not _is_missing(row.get(letter, ""))}
    if not options:
        raise ValueError(f"{where} (index {row['index']}) has no options")
    hint = "" if _is_missing(row.get("hint", "")) else row["hint"]
    answer = None if _is_missing(row.get("answer", "")) else row["answer"]
    if answer is not None and answer not in tuple("ABCD"):
        raise ValueError(f"{where} (index {row['index']}): answer is {answer[:60]!r}, not A, B, C or D")
    if answer is not None and answer not in options:
        raise ValueError(
            f"{where} (index {row['index']}): answer is {answer}, but the row has no such option ({', '.join(options)})"
        )
    index = int(row["index"])
    facts = {"question": row["question"], "hint": hint, "options": options, "unit": index % ROTATION}
    facts |= {"category": row.get("category", ""), "l2_category": row.get("l2-category", "")}
    text = _joined("" if hint.lower() in _LLAVA_MISSING else hint, row["question"], lettered(_shown(options)))
    kept = {column: row[column] for column in _UPLOADED if column in row}
    return Item(index, text, (picture,), answer, {**facts, "row": kept})


def _joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _shown(options: Mapping[str, str]) -> dict[str, str]:
    """The options that LLaVA's prompt lists: up to the first one that it takes for missing."""

    def there(letter: str) -> bool:
        return letter in options and options[letter].lower() not in _LLAVA_MISSING

    return {letter: options[letter] for letter in takewhile(there, "ABCD")}


def _check_rotations(rows: list[tuple[int, dict[str, str]]], file: Path) -> None:
    """Raises ValueError if rotations are missing (a table that lost lines); a table without any is fine."""
    rotations: dict[int, set[int]] = defaultdict(set)
    options: dict[int, int] = defaultdict(int)
    for _, row in rows:
        rotation, unit = divmod(int(row["index"]), ROTATION)
        rotations[unit].add(rotation)
        options[unit] = max(options[unit], sum(not _is_missing(row.get(letter, "")) for letter in "ABCD"))
    if all(found == {0} for found in rotations.values()):
        return
    broken = [u for u, found in rotations.items() if found != set(range(max(len(found), options[u])))]
    if broken:
        raise ValueError(
            f"{file}: {len(broken)} questions do not have one row for each rotation of their options "
            f"({examples(broken)}): an interrupted download or copy?"
        )


def _decode(encoded: str, where: str) -> bytes:
    try:
        picture = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: image is {encoded[:20]!r}..., not a picture in base64 ({error})") from None
    if not picture:
        raise ValueError(f"{where}: image is empty")
    try:
        Image.open(io.BytesIO(picture)).close()  # reads the header alone
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        said = "no kind of picture that is known" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where}: image is {encoded[:20]!r}..., in base64, but not a picture ({said})") from None
    return picture


def _is_missing(text: str) -> bool:
    """Whether pandas, with which all programs read these tables, takes the field for missing."""
    return text in _MISSING


def _right(per_item: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
    """By question: whether all its rotations are right."""
    right: dict[int, bool] = {}
    for record in per_item:
        right[record["unit"]] = right.get(record["unit"], True) and record["score"] > 0
    return right


def _percent_by(key: str, main_rows: Mapping[int, Mapping[str, Any]], right: Mapping[int, bool]) -> dict[str, Category]:
    members: dict[str, list[int]] = defaultdict(list)
    for unit, row in main_rows.items():
        if row[key]:
            members[row[key]].append(unit)
    return {
        name: Category(percent(sum(right[u] for u in units), len(units)), len(units)) for name, units in members.items()
    }


# What zipfile, the XML parser and openpyxl raise for files that are no workbook, or had bytes changed on their way
_DAMAGED = (
    BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError,
    SyntaxError,  # the XML parser's
)  # fmt: skip


class _NotInstalled(ValueError):
    """openpyxl is not there."""


def _openpyxl() -> ModuleType:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise _NotInstalled("the table for the server needs openpyxl: pip install llava_sp[eval]") from None
    return openpyxl


def _write_xlsx(path: Path, items: Sequence[Item], answers: Sequence[str]) -> None:
    openpyxl = _openpyxl()
    book = openpyxl.Workbook()
    sheet = book.active
    columns = _columns(items)
    table = [dict(zip(columns, columns))]
    for item, answer in zip(items, answers):
        table.append({**item.metadata["row"], "index": item.id, "prediction": answer})
    for number, row in enumerate(table, 1):
        for place, column in enumerate(columns, 1):
            if row[column] != "":
                cell = sheet.cell(number, place)
                cell.value = _NO_CELL.sub(" ", row[column]) if isinstance(row[column], str) else row[column]
                if isinstance(row[column], str):
                    cell.data_type = "s"  # or "=..." becomes a formula and "#N/A" an error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        book.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_xlsx(file: Path) -> list[dict[str, Any]]:
    """The rows of a submission. Raises ValueError if it is no such table."""
    cells = _cells(file)
    columns = [cell.value for cell in cells[0]] if cells else []
    absent = [name for name in ("index", "question", "prediction") if name not in columns]
    if absent:
        raise ValueError(
            f"{file} has no column {', '.join(absent)}; it has {', '.join(map(str, columns)) or 'nothing'}"
        )
    twice = [name for name, count in Counter(columns).items() if name is not None and count > 1]
    if twice:
        raise ValueError(f"{file} has more than one column {', '.join(map(str, twice))}")
    formulas = [number for number, row in enumerate(cells, 1) if any(cell.data_type == "f" for cell in row)]
    if formulas:
        raise ValueError(
            f"{file}: {len(formulas)} rows hold a formula where a text begins with = (row {examples(formulas)})"
        )
    empty = dict.fromkeys(columns)  # a row may end early
    table = [(n, empty | dict(zip(columns, (cell.value for cell in row)))) for n, row in enumerate(cells[1:], 2)]
    rows = {number: row for number, row in table if any(value is not None for value in row.values())}
    if not rows:
        raise ValueError(f"{file} has no rows below its header")
    wrong = [number for number, row in rows.items() if not _is_whole(row["index"])]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} rows have no whole number as index (row {examples(wrong)})")
    return [{str(name): value for name, value in row.items() if name is not None} for row in rows.values()]


def _cells(file: Path) -> list[tuple[Any, ...]]:
    """The cells of the first table of a workbook, row by row. Raises ValueError for whatever is none, or is damaged."""
    openpyxl = _openpyxl()
    content = io.BytesIO(read_bytes(file))
    try:
        book = openpyxl.load_workbook(content, read_only=True)
        if not book.worksheets:
            raise ValueError("it has no table")
        return [tuple(row) for row in book.worksheets[0].iter_rows()]
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is not an .xlsx table, or a damaged one ({str(error) or type(error).__name__})"
        ) from None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.exit(main(MMBench))
