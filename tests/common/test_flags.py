"""The flags of every command: numbers in their range, words in UTF-8, errors on one line."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest

from tests.test_design import commands

NEVER = ["", "x", "nan", "inf", "-2", "1e400", "9" * 5000, "1_000_000_000_000", "{a: 1}", "٣" * 20]
NOT_ZERO = {
    "--index",
    "--local-rank",
    "--seed",
    "--seeds",
    "--show",
    "--temperature",
    "--watchdog_minutes",
    "--workers",
}  # these may be 0


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser of a command, caught when it begins to parse."""

    class Caught(Exception):
        pass

    def catch(self, args=None, namespace=None):
        raise Caught(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr("llava_sp.common.command._Parser.parse_known_args", catch)
        runpy.run_module(module, run_name="__main__")
    return caught.value.args[0]


@pytest.fixture(scope="module")
def parsers() -> list[argparse.ArgumentParser]:
    return [parser_of(module) for module in commands()]


def refusal(parser: argparse.ArgumentParser, capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    return err


def test_numbers_out_of_range_are_refused_by_their_flag(parsers, capsys):
    tried = set()
    for parser in parsers:
        for action in parser._actions:
            assert action.type not in (int, float), f"{parser.prog} {action.dest}: a range, from common.command"
            if getattr(action.type, "__qualname__", "").startswith("fitting"):
                flag = action.option_strings[-1]
                tried.add((parser.prog, flag))
                for word in [*NEVER, *(() if flag in NOT_ZERO else ("0", "-1"))]:
                    error = refusal(parser, capsys, flag, word)
                    assert f"{flag} is {word[:40]!r}; it must be " in error, error
                if action.default is not None and flag != "--seeds":
                    assert action.type(str(action.default)) == action.default
    assert {flag for _, flag in tried} > {"--batch-size", "--limit", "--max-shard-size", "--top-p", "--judge-timeout"}
    assert len(tried) > 100


def test_words_that_are_no_text_are_refused(parsers, capsys):
    for parser in parsers:
        assert r"'--caf\udce9' is not UTF-8 text" in refusal(parser, capsys, "--caf\udce9")
        assert "is not UTF-8 text" in refusal(parser, capsys, "--model", "/data/\udcff")
        assert r"'a\x00b' is not UTF-8 text" in refusal(parser, capsys, "--model", "a\0b")


def test_empty_words_are_seen(parsers, capsys):
    """An empty path would be the folder where one stands: `--output "$UNSET"`."""
    paths = 0
    for parser in parsers:
        needed = [action for action in parser._actions if action.required]
        value = {a: "1" if getattr(a.type, "__qualname__", "").startswith("fitting") else "x" for a in needed}
        required = [word for a in needed for word in (*a.option_strings[:1], *([value[a]] if a.nargs != 0 else []))]
        if all(action.option_strings for action in parser._actions):
            assert "unrecognized arguments: x '' ' '\n" in refusal(parser, capsys, *required, "x", "", " ")
        for action in parser._actions:
            if action.type is Path and action.option_strings:
                paths += 1
                for word in ("", " "):
                    error = refusal(parser, capsys, *required, action.option_strings[0], word)
                    assert f"{action.option_strings[-1]} is {word!r}; it must be a path" in error
    assert paths > 20
