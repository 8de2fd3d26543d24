"""Phantoms as examples: drawn once, another question and display in every epoch, and what is said is true."""

from pathlib import Path

import numpy as np
import pytest

from echovlm_ray.data.phantom.parsing import parse
from echovlm_ray.data.phantom.phantom import phantom
from echovlm_ray.data.phantom.schema import SIDE
from echovlm_ray.tasks import Language
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.examples import Example, ExampleError
from echovlm_ray.training.phantom_pool import LOOP_FRAMES, PhantomPool
from echovlm_ray.training.phantom_source import PhantomSource
from echovlm_ray.training.recipe import DataSection, PhantomSection
from echovlm_ray.training.sources import DataFiles, open_sources

SECTION = PhantomSection(seed=3, pictures=14, loops=2, examples_each=2, exclude=("breast/simple_cyst",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "phantoms"
    counted: list[int] = []
    PhantomPool.open(folder, SECTION, workers=1, start=counted.append, progress=lambda count: counted.append(-count))
    assert sum(counted) == 0
    return folder


@pytest.fixture
def source(folder: Path) -> PhantomSource:
    return PhantomSource(PhantomPool.open(folder, SECTION))


def answer_of(example: Example) -> str:
    return example.messages[-1]["content"][0]["text"]  # type: ignore[typeddict-item]


def test_pictures_are_those_of_the_corpus(folder: Path) -> None:
    pool = PhantomPool.open(folder, SECTION)
    for number in (0, 13):
        np.testing.assert_array_equal(pool.pictures_NHW[number], phantom(3, number, classes=pool.classes).image)
    assert pool.loops_LFHW.shape == (2, LOOP_FRAMES, 224, 224)
    assert ("breast", "simple_cyst") not in pool.classes


def test_an_example_is_a_function_of_index_and_epoch(source: PhantomSource) -> None:
    assert len(source) == 32
    again = source.example(5, 2)
    first = source.example(5, 2)
    assert first.messages == again.messages
    np.testing.assert_array_equal(np.asarray(first.pictures[0]), np.asarray(again.pictures[0]))
    others = [source.example(index, epoch) for index, epoch in ((4, 2), (5, 3), (5, 4))]
    assert any(other.messages != first.messages for other in others)
    assert all(not np.array_equal(np.asarray(other.pictures[0]), np.asarray(first.pictures[0])) for other in others)


def test_reports_say_what_is_shown_even_of_a_mirrored_picture(folder: Path) -> None:
    section = SECTION.model_copy(update={"tasks": {"report": 1.0}})
    source = PhantomSource(PhantomPool.open(folder, section))
    sides = set()
    for index in range(len(source)):
        for epoch in range(3):
            example = source.example(index, epoch)
            assert example.attributes is not None
            answer = answer_of(example)
            language: Language = "zh" if "超声" in answer else "en"
            assert parse(answer, language) == example.attributes
            assert example.emphasis
            assert all(word in answer for word in example.emphasis)
            sides.add((index // 2, example.attributes.get(SIDE)))
    # Some picture with a marker was shown both ways round.
    numbers = [number for number, side in sides if side is not None]
    assert len(numbers) > len(set(numbers))


def test_a_mirrored_picture_has_mirrored_tissue(folder: Path) -> None:
    source = PhantomSource(PhantomPool.open(folder, SECTION))
    pool = PhantomPool.open(folder, SECTION)
    seen = set()
    for index in range(0, 28):
        for epoch in range(4):
            example = source.example(index, epoch)
            assert example.tissue is not None
            plain = np.array_equal(example.tissue, pool.tissue_NRC[index // 2])
            assert plain or np.array_equal(example.tissue, pool.tissue_NRC[index // 2][:, ::-1])
            seen.add(plain)
    assert seen == {True, False}


def test_without_variation_pictures_stay_as_they_were_drawn(folder: Path) -> None:
    section = SECTION.model_copy(update={"vary": False})
    source = PhantomSource(PhantomPool.open(folder, section))
    pool = PhantomPool.open(folder, section)
    for index in (0, 9, 27):
        np.testing.assert_array_equal(np.asarray(source.example(index, 1).pictures[0]), pool.pictures_NHW[index // 2])


def test_loops_are_pairs_of_frames(source: PhantomSource) -> None:
    lengths = set()
    for epoch in range(12):
        loop = source.example(28, epoch)
        frames = loop.pictures[0]
        assert isinstance(frames, list)
        lengths.add(len(frames))
        assert loop.messages[1]["content"][0]["type"] == "video"
    assert lengths <= {2, 4, 6, 8}
    assert len(lengths) > 1


def test_what_is_kept_back_shares_no_picture(folder: Path) -> None:
    data = DataSection(phantoms=SECTION, validation_share=0.3)
    train, held_out, _ = open_sources(DataFiles(), data, seed=0, phantoms=folder)
    assert held_out is not None
    places = [{source.place(index) for index in range(len(source))} for source in (train, held_out)]
    assert len(places[1]) == 4
    assert not places[0] & places[1]
    assert len(train) + len(held_out) == 32


def test_phantoms_of_another_recipe_are_refused(folder: Path) -> None:
    with pytest.raises(TrainingError, match="another recipe"):
        PhantomPool.open(folder, SECTION.model_copy(update={"seed": 4}))


def test_a_class_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExampleError, match="breast/cist"):
        PhantomPool.open(tmp_path / "pool", SECTION.model_copy(update={"exclude": ("breast/cist",)}))
    assert not (tmp_path / "pool").exists()
