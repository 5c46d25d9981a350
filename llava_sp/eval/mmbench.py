"""MMBench (Liu et al. 2023): questions with two to four options, each asked in every rotation of its options.

    python -m llava_sp.eval.mmbench --model M --data D --output O [--split dev|test]

D holds (in D itself or one folder below) the table mmbench_dev_20230712.tsv, or mmbench_test_20230712.tsv, with the
images in it; the newer MMBench_DEV_EN.tsv and MMBench_TEST_EN.tsv are read too. The Chinese tables are for
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
just these cases). LLaVA reads "nan" and "none" in any case as missing too, and ends its list of options at the first of them:
an option "none" is not shown under `llava15`, and is one like any other under the other protocols.
"""

from __future__ import annotations

import base64
import io
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from llava_sp.common.files import counted, examples
from llava_sp.common.schema import Check
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, OPTION_LETTER, Benchmark, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import by_id, find, find_split, verdict
from llava_sp.eval.inputs.xlsx import NotInstalled, differences, import_openpyxl, is_missing, read_xlsx, write_xlsx
from llava_sp.eval.scoring.letters import lettered, lmms_mmbench, vlmevalkit
from llava_sp.eval.scoring.records import categories, grouped, row, share_right

ROTATION = 1_000_000
ABILITIES = {  # in the order of the leaderboard
    "logic_reasoning": "LR",
    "attribute_reasoning": "AR",
    "relation_reasoning": "RR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "coarse_perception": "CP",
}
ROW = {"index": Check(str.isdecimal, "a whole number", str), "question": str, "A": str, "B": str, "image": str}
SUBMISSION = {"index": int, "question": (str, int, float, None), "prediction": (str, None)}
_UPLOADED = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
_SMALLEST_IMAGE = 64  # a shorter field is the index of the row that has the image (VLMEvalKit's tables)
_LLAVA_MISSING = ("nan", "none")  # what LLaVA reads as missing besides, in any case


class MMBench(Benchmark):
    name = "mmbench"
    title = "MMBench accuracy in percent, all rotations right"
    splits = ("dev", "test")
    protocols = ("llava15", "vlmevalkit", "vlmevalkit_v0.2", "lmms_eval")
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = dict.fromkeys(("vlmevalkit", "vlmevalkit_v0.2"), Generation(max_new_tokens=512))
    published: Mapping[str, float] = {LLAVA15: 64.3, LLAVA15_LORA: 66.1}
    published_on = "dev of 2023-07-12, 1176 questions"
    unscored = "only the MMBench server can score them"
    tables: ClassVar = {
        "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev.tsv"),
        "test": ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv", "mmbench_test.tsv"),
    }
    letter_suffix = OPTION_LETTER
    lmms_suffix = "\n\nAnswer with the option's letter from the given choices directly."

    def load(self, data: Path) -> list[Item]:
        self.split, file = find_split(data, self.tables, self.split, f"table of {self.name}")
        rows = by_id(self.read_table(file, "\t", ROW), file, "index")
        _check_rotations(rows.values(), file)
        images: dict[str, bytes] = {}  # equal images are one object, so that their rows share its computation
        items = []
        for line in rows.values():
            encoded = line["image"]
            if len(encoded) < _SMALLEST_IMAGE and encoded in rows:
                encoded = rows[encoded]["image"]
            where = f"{file}, line {line.number}"
            if encoded not in images:
                images[encoded] = _decode(encoded, where)
            items.append(_item(line, images[encoded], where))
        lost = [item.id for item in items if item.reference is None]
        if lost and len(lost) < len(items):
            raise ValueError(f"{file}: {len(lost)} of {len(items)} rows have no answer (index {examples(lost)})")
        if lost:
            import_openpyxl()  # before hours of answering: without the table for the server they would be for nothing
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
            return vlmevalkit("nan" if is_missing(text) else text, options, version=version)
        return text.strip() if text.strip() in tuple("ABCD") else None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            letter = self.infer(text, item.metadata["options"])
            score = None if item.reference is None else 100.0 * (letter == item.reference)
            facts = {key: value for key, value in item.metadata.items() if key != "row"}
            per_item.append(row(item, letter, text, score, **facts))
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        questions = _questions(per_item)
        by_l2 = categories(grouped(questions, "l2_category", ABILITIES), share_right)
        by_ability = {ABILITIES.get(name, name): category for name, category in by_l2.items()}
        by_category = categories(grouped(questions, "category"), share_right)
        metrics = {
            "questions": len(questions),
            "rows": len(per_item),
            "accuracy_of_rows": share_right(per_item),
            "not_understood": sum(record["answer"] is None for record in per_item),
            "by_ability": {name: category.score for name, category in by_ability.items()},
            "by_category": {name: category.score for name, category in by_category.items()},
        }
        return Scores(self.headline(per_item), metrics, per_item, by_ability, count=len(questions))

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """Percent of questions with all rotations right."""
        return share_right(_questions(per_item))

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / "submission.xlsx"
        rows = [{"index": i.id, **i.metadata["row"], "prediction": answer} for i, answer in zip(items, answers)]
        try:
            write_xlsx(path, [{name: line[name] for name in _UPLOADED if name in line} for line in rows])
        except NotInstalled as error:
            if items[0].reference is None:
                raise
            print(f"note: no {path.name} for the server: {error}", file=sys.stderr)
            return None
        return path

    def validate(self, file: Path, data: Path) -> str:
        there = [split for split in self.splits if find(data, *self.tables[split])]
        splits = [self.split] if self.split or not there else there
        rows = read_xlsx(file, SUBMISSION)
        wanted = ((split, type(self)(split).load(data)) for split in splits)
        tries = (
            (f"rows of {self.name} {split}", differences(rows, {item.id: item.metadata["row"] for item in items}))
            for split, items in wanted
        )
        return verdict(file, [line["prediction"] for line in rows], tries)


def _item(line: Mapping[str, str], image: bytes, where: str) -> Item:
    given = {
        name: "" if is_missing(text) else text for name, text in line.items() if name in (*"ABCD", "hint", "answer")
    }
    options = {letter: given[letter] for letter in "ABCD" if given.get(letter)}
    hint, answer = given.get("hint", ""), given.get("answer") or None
    if not options or (answer is not None and answer not in options):
        raise ValueError(
            f"{where} (index {line['index']}): answer is {str(answer)[:60]!r}; its options are {', '.join(options) or 'empty'}"
        )
    index = int(line["index"])
    facts = {"question": line["question"], "hint": hint, "options": options, "unit": index % ROTATION}
    facts |= {"category": line.get("category", ""), "l2_category": line.get("l2-category", "")}
    text = _joined("" if hint.lower() in _LLAVA_MISSING else hint, line["question"], lettered(_shown(options)))
    kept = {name: line[name] for name in _UPLOADED[1:] if name in line}
    return Item(index, text, (image,), answer, {**facts, "row": kept})


def _joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _shown(options: Mapping[str, str]) -> dict[str, str]:
    """The options that LLaVA's prompt lists: up to the first one that it reads as missing."""
    there = takewhile(lambda x: x in options and options[x].lower() not in _LLAVA_MISSING, "ABCD")
    return {letter: options[letter] for letter in there}


def _check_rotations(rows: Iterable[Mapping[str, str]], file: Path) -> None:
    """Raises ValueError if rotations are missing (a table that lost lines); a table without any is fine."""
    rotations: dict[int, set[int]] = defaultdict(set)
    options: dict[int, int] = defaultdict(int)
    for line in rows:
        rotation, unit = divmod(int(line["index"]), ROTATION)
        rotations[unit].add(rotation)
        options[unit] = max(options[unit], sum(not is_missing(line.get(letter, "")) for letter in "ABCD"))
    broken = [u for u, found in rotations.items() if found != set(range(max(len(found), options[u])))]
    if broken and any(found != {0} for found in rotations.values()):
        raise ValueError(
            f"{file}: not one row for each rotation of the options: {counted(len(broken), 'question')} ({examples(broken)}): an "
            "interrupted download or copy?"
        )


def _decode(encoded: str, where: str) -> bytes:
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
        Image.open(io.BytesIO(content)).close()  # reads the header alone
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where}: image is {encoded[:20]!r}..., not an image in base64 ({reason})") from None
    return content


def _questions(per_item: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record for each question, right if all its rotations are; n times where a sample has its rotations n times."""
    questions = []
    for rows in grouped(per_item, "unit").values():
        times = len(rows) // len({record["question_id"] for record in rows})
        questions += [{**rows[0], "score": min(record["score"] for record in rows)}] * times
    return questions


if __name__ == "__main__":
    sys.exit(main(MMBench))
