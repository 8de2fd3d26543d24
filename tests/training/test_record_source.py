"""Records of files as examples: every form, every medium in its place, and what is wrong named by file and line."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echovlm_ray.data.phantom.catalogue import all_classes, attributes_of, draw_attributes
from echovlm_ray.data.phantom.wording.render import STYLES, render, render_diagnosis
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.model.text_tokens import IMAGE_TOKEN
from echovlm_ray.prompts import SYSTEM, build_messages
from echovlm_ray.tasks import Language
from echovlm_ray.training.encode import IGNORED
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.record_source import RecordSource
from tests.data.records import cine, png, record, turns, write_lines
from tests.training.support import encoder_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shade in (("a.png", 1), ("b.png", 250)):
        (tmp_path / name).write_bytes(png(shade, (90, 60)))
    (tmp_path / "c.dcm").write_bytes(cine())
    return tmp_path


def source_of(folder: Path, *records: dict[str, Any]) -> RecordSource:
    return RecordSource(write_lines(folder / "all.jsonl", records))


def test_the_prompt_is_what_the_service_builds(folder: Path, start: Path) -> None:
    system = {"from": "system", "value": SYSTEM["en"]}
    source = source_of(
        folder, record("one", conversations=[system, *turns("<image>What is seen?", "A simple cyst.\n")])
    )
    encoded = encoder_of(start).encode(source.example(0, 0))
    processor = EchoVLMProcessor.from_pretrained(start)
    served = processor.encode_chat(build_messages("free", "en", "What is seen?", ["image"]), encoded.vision)
    assert encoded.input_ids_T[: len(served)].tolist() == served
    learnt = encoded.target_T[encoded.target_T != IGNORED].tolist()
    assert processor.tokenizer.decode(learnt) == "A simple cyst.<|im_end|>"


def test_several_images_stand_where_they_are_marked(folder: Path, start: Path) -> None:
    asked = turns("A <image> and <image>?", "Both.", "More?", "Nothing <|im_end|> more.")
    example = source_of(folder, record("two", image=["a.png", "b.png"], conversations=asked)).example(0, 0)
    assert example.messages[0]["content"] == [
        {"type": "text", "text": "A"},
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    assert [int(np.asarray(picture)[0, 0, 0]) for picture in example.pictures] == [1, 250]
    encoded = encoder_of(start).encode(example)
    vocabulary = EchoVLMProcessor.from_pretrained(start).tokenizer.get_vocab()
    learnt = encoded.target_T[encoded.target_T != IGNORED].tolist()
    # What a text says is text, even the name of a control token: two answers, two ends.
    assert learnt.count(vocabulary["<|im_end|>"]) == 2
    image = vocabulary[IMAGE_TOKEN]
    assert encoded.input_ids_T.tolist().count(image) == sum(item.num_tokens for item in encoded.vision)
    assert image not in learnt


@pytest.mark.parametrize("field", ["image", "video"])
def test_a_cine_loop_is_a_video_under_either_mark(folder: Path, start: Path, field: str) -> None:
    media = {"image": [], field: ["c.dcm"]}
    example = source_of(folder, record("loop", conversations=turns(f"<{field}>What?", "A loop."), **media)).example(
        0, 0
    )
    assert [part["type"] for part in example.messages[0]["content"]] == ["video", "text"]
    (item,) = encoder_of(start).encode(example).vision
    # As many frames as the service takes, in pairs.
    assert (item.is_video, item.grid[0]) == (True, 4)


def test_media_without_marks_are_shown_in_the_first_question(folder: Path) -> None:
    system = {"from": "system", "value": "You describe."}
    chat = [system, *turns("What?", "A loop.", "Sure?", "Yes.")]
    example = source_of(folder, record("bare", image=["a.png"], video=["c.dcm"], conversations=chat)).example(0, 0)
    kinds = [[part["type"] for part in message["content"]] for message in example.messages]
    assert kinds == [["text"], ["image", "video", "text"], ["text"], ["text"], ["text"]]


def test_several_files_in_any_form_have_one_folder_of_images(folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "array.json").write_text(json.dumps([record("one"), record("two", image=["b.png"])], indent=1))
    chat = {"id": "three", "images": ["b.png"], "messages": [{"role": "user", "content": "<image>What?"}]}
    chat["messages"].append({"role": "assistant", "content": "A cyst."})  # type: ignore[attr-defined]
    paths = [lists / "array.json", write_lines(lists / "lines.jsonl", [chat])]
    source = RecordSource(paths, folder)
    shades = [int(np.asarray(source.example(index, 0).pictures[0])[0, 0, 0]) for index in range(len(source))]
    assert shades == [1, 250, 250]
    assert source.place(2) == f"{lists / 'lines.jsonl'}, line 1"
    with pytest.raises(ExampleError, match="image 1 of 1 does not exist below the image root"):
        RecordSource(paths).example(0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": ["SECRET-absent.png"]}, "image 1 of 1 does not exist below the image root"),
        ({"image": ["../a.png"]}, "image 1 of 1 leads out of the image root"),
        ({"image": ["SECRET.png"]}, "image 1 of 1 is a PNG file that is damaged"),
        ({"image": []}, "marks 1 images with <image>, but lists 0"),
        ({"image": ["a.png", "b.png"]}, "marks 1 images with <image>, but lists 2"),
        ({"conversations": [{"from": "gpt"}]}, "must be an object with from and value"),
        ({"conversations": turns("<image>What?")}, "human and gpt in alternation"),
        ({"conversations": turns("<image>What?", " ")}, "answer without text"),
        ({"conversations": []}, "at least one question and its answer"),
        ({"conversations": None}, "must be a list"),
        ({"image": [3]}, "image must be a list of texts"),
        ({"attributes": {"organ": "breast", "class": "SECRET", "values": {}}}, "none that a phantom has"),
    ],
)
def test_a_broken_record_is_named_by_its_line_and_not_quoted(
    folder: Path, change: dict[str, object], reason: str
) -> None:
    (folder / "SECRET.png").write_bytes(png()[:60])
    source = source_of(folder, record("whole"), record("SECRET", **change))
    assert len(source.example(0, 0).pictures) == 1
    with pytest.raises(ExampleError) as raised:
        source.example(1, 0)
    assert str(raised.value).startswith(f"{folder / 'all.jsonl'}, line 2: ")
    assert reason in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_a_broken_line_is_named_and_the_others_are_read(folder: Path) -> None:
    path = folder / "all.jsonl"
    path.write_text(json.dumps(record("one")) + '\n{"id": \n')
    source = RecordSource(path)
    assert len(source.example(0, 0).pictures) == 1
    with pytest.raises(ExampleError, match=r"all\.jsonl, line 2: line 2, column 7"):
        source.example(1, 0)


def test_what_cannot_be_opened_is_refused(folder: Path) -> None:
    whole, empty, cut = write_lines(folder / "whole.jsonl", [record("one")]), folder / "empty.json", folder / "cut.json"
    empty.write_text("[]")
    cut.write_text('[{"id": "one"')
    for paths, images, reason in (
        ([whole, empty], None, r"empty\.json is empty"),
        ([whole, cut], None, r"cut\.json, line 1: the file ends in the middle"),
        ([folder / "absent.json"], None, r"absent\.json: No such file"),
        ([whole], folder / "none", "there is no folder"),
    ):
        with pytest.raises(ExampleError, match=reason):
            RecordSource(paths, images)


def test_a_worker_that_gets_a_pickled_source_reads_the_same(folder: Path) -> None:
    source = source_of(folder, record("one"), record("two", image=["b.png"]))
    sent = pickle.dumps(source)
    copy = pickle.loads(sent)
    assert copy.example(1, 0).messages == source.example(1, 0).messages
    assert np.asarray(copy.example(1, 0).pictures[0]).tolist() == np.asarray(source.example(1, 0).pictures[0]).tolist()
    assert copy.place(1) == source.place(1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_words_of_attributes_and_diagnosis_are_emphasis(folder: Path, language: Language) -> None:
    rng = np.random.default_rng(0)
    for number, (organ, class_name) in enumerate(all_classes()):
        attributes = draw_attributes(rng, organ, class_name)
        known = {"attributes": attributes.as_json(), "language": language}
        report = render(attributes, language, number % STYLES)
        source = source_of(
            folder,
            record("report", conversations=turns("<image>Report?", report), **known),
            record("diagnosis", conversations=turns("<image>What?", render_diagnosis(attributes, language)), **known),
            record("other", conversations=turns("<image>What?", "§"), **known),
        )
        example = source.example(0, 0)
        assert example.attributes == attributes
        assert example.emphasis
        assert all(word in report for word in example.emphasis)
        # One word at least for every value that the findings state, and one for the diagnosis.
        assert len(example.emphasis) >= len(attributes.pairs)
        assert source.example(1, 0).emphasis
        assert (source.example(2, 0).emphasis, source.example(2, 0).attributes) == ((), attributes)


def test_emphasis_is_spelt_as_in_the_answer_and_counts_in_the_loss(folder: Path, start: Path) -> None:
    values = {"tissue": "fatty", "lesion": "mass", "size": "small", "depth": "deep", "shape": "oval"}
    values |= {"orientation": "parallel", "margin": "circumscribed", "echo": "anechoic", "posterior": "enhancement"}
    attributes = attributes_of("breast", "simple_cyst", values)
    answer = "Oval and anechoic: a Simple cyst, not deep."
    known = record("one", conversations=turns("<image>What?", answer), attributes=attributes.as_json())
    source = source_of(folder, known, record("plain", conversations=turns("<image>What?", answer)))
    example = source.example(0, 0)
    assert sorted(example.emphasis) == ["Oval", "Simple cyst", "anechoic", "deep"]
    assert (source.example(1, 0).emphasis, source.example(1, 0).attributes) == ((), None)
    encoder = encoder_of(start, emphasis_weight=5.0)
    weighted, plain = encoder.encode(example), encoder.encode(source.example(1, 0))
    decode = EchoVLMProcessor.from_pretrained(start).tokenizer.decode
    heavy = weighted.target_T[weighted.weight_T == 5].tolist()
    assert str(decode(heavy)).replace(" ", "") == "OvalanechoicSimplecystdeep"
    assert plain.weight_T.unique().tolist() == [0, 1]
