"""Mixture files and what a weight means."""

from __future__ import annotations

import json

import pytest

from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import Source, load_mixture
from tests.messages import refused


@pytest.fixture
def files(tmp_path, make_record):
    for name, count in (("a", 10), ("b", 7)):
        (tmp_path / f"{name}.json").write_text(json.dumps([make_record(f"q{i}", f"{name}{i}") for i in range(count)]))
    return tmp_path


def write(folder, text):
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


def test_paths_are_relative_to_the_file(files, monkeypatch):
    monkeypatch.setenv("WHERE", str(files))
    path = write(files, "- {annotations: a.json, images: pictures, weight: 0.5}\n- annotations: $WHERE/b.json\n")
    assert load_mixture(path) == [
        Source(files / "a.json", files / "pictures", 0.5),
        Source(files / "b.json", files, 1.0),
    ]
    assert load_mixture([Source(files / "a.json", files)]) == [Source(files / "a.json", files, 1.0)]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ("empty",)),
        ("annotations: a.json", ("list",)),
        ("[]", ("[]", "list", "at least one")),
        ("- a.json", ("entry 0 (counted from 0)", "'a.json'", "object")),
        ("- {annotations: a.json, wieght: 2}", ("entry 0", "'wieght': 2}", "only annotations, images, weight")),
        ("- {images: x}", ("entry 0", "no annotations", "images")),
        ("- {annotations: a.json, weight: 0}", ("weight is 0", "above 0")),
        ("- {annotations: a.json, weight: .inf}", ("weight is inf",)),
        ("- {annotations: a.json, weight: 1001}", ("entry 0", "weight is 1001", "at most 1,000")),
        ("- {annotations: a.json, weight: 9223372036854775808}", ("weight is 9223372036854775808", "at most 1,000")),
        ("- {annotations: a.json, weight: lots}", ("weight is 'lots'",)),
        ("- [", ("YAML",)),
    ],
)
def test_bad_mixtures(files, text, parts):
    with refused("mix.yaml", *parts):
        load_mixture(write(files, text))


def test_missing_annotations(files, processor):
    sources = load_mixture(write(files, "- {annotations: a.json}\n- {annotations: c.json}"))
    with refused("annotation file", "c.json"):
        ConversationDataset(sources, processor)


def test_missing_mixture(tmp_path):
    with pytest.raises(ValueError, match="none.yaml does not exist"):
        load_mixture(tmp_path / "none.yaml")


def seen(dataset) -> list[tuple[str, int]]:
    return [(dataset.origin(i)[0][-6], dataset.origin(i)[1]) for i in range(len(dataset))]


def test_weights(files, processor):
    def dataset(*weights, seed=0):
        sources = [Source(files / f"{name}.json", files, weight) for name, weight in zip("ab", weights)]
        return ConversationDataset(sources, processor, seed=seed)

    assert seen(dataset(1, 1)) == [("a", i) for i in range(10)] + [("b", i) for i in range(7)]
    assert seen(dataset(2)) == [("a", i) for i in range(10)] * 2
    half, again, other = (seen(dataset(0.5, seed=seed)) for seed in (0, 0, 1))
    assert half == again != other and len(half) == len(set(half)) == 5
    assert seen(dataset(1.5)) == [("a", i) for i in range(10)] + half
    assert len(dataset(0.5, 0.3)) == 5 + 2
    with pytest.raises(ValueError, match="leave no samples"):
        dataset(0.01)
