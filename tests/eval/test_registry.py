"""Benchmarks are found by what their files define, and each keeps the promises of the base class."""

from __future__ import annotations

import pytest

from llava_sp.eval.base import SOURCES, Benchmark
from llava_sp.eval.run.registry import ORDER, benchmark_names, load_benchmark
from tests.messages import refused


def test_all_benchmarks_are_found_in_the_papers_order():
    assert tuple(benchmark_names()[: len(ORDER)]) == ORDER  # others follow, by name


def test_a_new_file_is_found(tmp_path):
    (tmp_path / "zebra.py").write_text('class Zebra(Benchmark):\n    name = "zebra"\n')
    (tmp_path / "gqa.py").write_text('class GQA(Benchmark):\n    name = "gqa"\n')
    (tmp_path / "helper.py").write_text('name = "helper"\nclass A:\n    name = "other"\n')
    assert benchmark_names(tmp_path) == ["gqa", "zebra"]
    (tmp_path / "typed.py").write_text('class Typed(Benchmark):\n    name: ClassVar[str] = "typed"\n')
    assert benchmark_names(tmp_path) == ["gqa", "typed", "zebra"]
    (tmp_path / "colour_qa.py").write_text(
        'class ColourQA(Benchmark):\n    name = "colourqa"\n    title = "accuracy"\n'
    )
    with refused("colour_qa.py", "'colourqa'", "colourqa.py"):
        benchmark_names(tmp_path)


def test_unknown_name_lists_the_known():
    with refused("'vqa'", "vqav2, gqa"):
        load_benchmark("vqa")


@pytest.mark.parametrize("name", ORDER)
def test_each_is_complete(name):
    cls = load_benchmark(name)
    assert issubclass(cls, Benchmark) and cls.name == name and cls.title
    assert cls.protocols[0] in ("llava15", "official") and set(cls.generations) <= set(cls.protocols)
    assert set(cls.published) <= set(SOURCES)
