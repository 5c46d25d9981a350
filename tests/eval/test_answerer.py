"""Questions about the same images: the images go through the model once, and the answers are those of separate runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.run.answerer import ModelAnswerer
from llava_sp.eval.run.runner import in_order

WORDS = ("What", "is", "the", "colour", "of", "large", "small", "two", "shapes", "left", "?", "\nAnswer.")


class Plain(Benchmark):
    name = "plain"
    title = "nothing"

    def load(self, data):
        return []

    def score(self, items, answers) -> Scores:
        return Scores(None, {}, [])


@pytest.fixture(scope="module")
def opened(golden):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="cropping", seed=0)
    return model.eval(), LlavaSPProcessor.from_backbones(model.config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number in range(4):
        width, height = rng.integers(20, 200, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [folder / "0.png", folder / "1.png", (folder / "2.png").read_bytes(), folder / "3.png"]


def make_items(images_of: list[tuple], seed: int = 0) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [Item(i, " ".join(rng.choice(WORDS, rng.integers(1, 25))), images) for i, images in enumerate(images_of)]


def answered(opened, items: list[Item], share_images: bool, **changes) -> tuple[list[str], int]:
    """The answers to one batch, and how many images the vision tower saw."""
    model, processor = opened
    generation = Generation(max_new_tokens=12, **changes)
    answerer = ModelAnswerer(SimpleNamespace(model=model), processor, Plain(), generation, share_images=share_images)
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    texts = answerer.answer(answerer.prepare(items))
    hook.remove()
    return texts, sum(seen)


def test_shared_images_are_encoded_once_and_answers_stay(opened, files):
    a, b, c, d = ((image,) for image in files)
    items = make_items([a, b, a, a, c, b, d, a])
    shared, encoded = answered(opened, items, True)
    separate, all_encoded = answered(opened, items, False)
    assert (encoded, all_encoded) == (4, 8)
    assert shared == separate and len(set(shared)) > 4
    for item, text in zip(items, shared):
        assert answered(opened, [item], True) == ([text], 1)


def test_several_images_to_a_question(opened, files):
    a, b, c, _ = files
    items = make_items([(a, b), (a, b), (b, a), (c,), (a, b), (c,)])
    shared, encoded = answered(opened, items, True)
    assert encoded == 5  # (a, b), (b, a), (c): the files of a prompt are encoded with it
    assert shared == answered(opened, items, False)[0]


def test_questions_without_images_stand_alone(opened, files):
    a, b, *_ = ((image,) for image in files)
    items = make_items([a, a, (), b, ()])
    texts, encoded = answered(opened, items, True)
    assert encoded == 3 and texts == answered(opened, items, False)[0]
    assert answered(opened, items[2:3], True) == ([texts[2]], 0)


def test_beams_are_not_shared(opened, files):
    items = make_items([(files[0],)] * 3)
    texts, encoded = answered(opened, items, True, num_beams=2)
    assert encoded >= 3 and (texts, encoded) == answered(opened, items, False, num_beams=2)


def test_sampled_answers_depend_on_seed_and_prompt_alone(opened, files):
    items = make_items([(files[0],), (files[1],)])
    model, processor = opened

    def draw(seed: int, order: list[Item]) -> dict[int, str]:
        generation = Generation(max_new_tokens=12, do_sample=True, temperature=1.5)
        answerer = ModelAnswerer(SimpleNamespace(model=model), processor, Plain(), generation, seed)
        return {item.id: answerer.answer(answerer.prepare([item]))[0] for item in order}

    torch.manual_seed(7)
    first = draw(0, items)
    assert first == draw(0, items[::-1])
    assert first != draw(1, items)


def test_questions_of_an_image_stay_together_longest_first(files):
    a, b, *_ = ((image,) for image in files)
    items = [Item(i, "x" * n, images) for i, (n, images) in enumerate([(5, a), (9, b), (30, a), (9, ()), (40, ())])]
    assert [item.id for item in in_order(Plain(), items)] == [2, 0, 1, 4, 3]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("text", ["<image>", "Is <image> a tag?", "<image><image>"])
def test_a_question_with_marks_of_its_own_is_refused(opened, files, text, count):
    """Of a benchmark, a mark that no image belongs to is an image that was lost."""
    model, processor = opened
    answerer = ModelAnswerer(SimpleNamespace(model=model), processor, Plain(), Generation())
    with pytest.raises(
        ValueError, match=rf"question 7: {count + text.count('<image>')} <image> marks? for {count} image"
    ):
        answerer.prepare([Item(7, text, tuple(files[:count]))])


def test_half_a_surrogate_pair_names_the_question(opened):
    model, processor = opened
    answerer = ModelAnswerer(SimpleNamespace(model=model), processor, Plain(), Generation())
    with pytest.raises(ValueError, match="question 3: half a surrogate pair"):
        answerer.prepare([Item(3, "a \ud83d")])
