"""Records to token ids and labels; a record that is too long is refused or dropped, never cut."""

from pathlib import Path

import pytest

from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.encoding import IGNORED, LongRecords, TooLongError, encode_record, load_media
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.model.processing import IMAGE_TOKEN, VIDEO_TOKEN, EchoVLMProcessor
from echovlm_ray.prompts import SYSTEM, build_messages
from echovlm_ray.vision.images import ImageLimits
from tests.data.records import cine, png, record, turns, write_lines

LIMITS = ImageLimits(max_image_bytes=10**7, max_image_pixels=10**7, max_frames=4)


@pytest.fixture(scope="module")
def processor(demo_checkpoint: Path) -> EchoVLMProcessor:
    return EchoVLMProcessor.from_pretrained(demo_checkpoint)


def token_id(processor: EchoVLMProcessor, token: str) -> int:
    return processor.tokenizer.get_vocab()[token]


@pytest.fixture
def dataset(tmp_path: Path) -> RecordDataset:
    for name, shade in (("a.png", 1), ("b.png", 250)):
        (tmp_path / name).write_bytes(png(shade, (90, 60)))
    (tmp_path / "c.dcm").write_bytes(cine())
    system = {"from": "system", "value": SYSTEM["en"]}
    records = [
        record("one", conversations=[system, *turns("<image>What is seen?", "A simple cyst.")]),
        record(
            "two",
            image=["a.png", "b.png"],
            conversations=turns("A <image> and <image>?", "Both.", "More?", "Nothing <|im_end|> more."),
        ),
        record("video", image=[], video=["c.dcm"], conversations=turns("<video>What?", "A loop.")),
    ]
    return RecordDataset(write_lines(tmp_path / "all.jsonl", records))


def test_the_prompt_is_what_the_service_builds(dataset: RecordDataset, processor: EchoVLMProcessor) -> None:
    root = ImageRoot(Path(dataset.files[0].path).parent)
    vision = load_media(dataset[0], root, processor, limits=LIMITS)
    encoded = encode_record(dataset[0], vision, processor, max_tokens=1000)
    served = processor.encode_chat(build_messages("free", "en", "What is seen?", ["image"]), vision)
    assert encoded.input_ids[: len(served)] == served
    answer = encoded.input_ids[len(served) :]
    assert processor.decode(answer) == "A simple cyst.\n"
    assert encoded.labels[: len(served)] == [IGNORED] * len(served)
    # The answer and its end are learnt, the line end after it is not.
    assert encoded.labels[len(served) :] == [*answer[:-1], IGNORED]


def test_each_answer_of_several_is_learnt(dataset: RecordDataset, processor: EchoVLMProcessor) -> None:
    root = ImageRoot(Path(dataset.files[0].path).parent)
    vision = load_media(dataset[1], root, processor, limits=LIMITS)
    encoded = encode_record(dataset[1], vision, processor, max_tokens=1000)
    learnt = [token for token in encoded.labels if token != IGNORED]
    assert processor.decode(learnt) == "Both.Nothing <|im_end|> more."
    # What a text says is text, even the name of a control token.
    end = token_id(processor, "<|im_end|>")
    assert learnt.count(end) == 2
    image = token_id(processor, IMAGE_TOKEN)
    assert encoded.input_ids.count(image) == sum(item.num_tokens for item in vision)
    assert image not in learnt


def test_a_cine_loop_is_a_video(dataset: RecordDataset, processor: EchoVLMProcessor) -> None:
    root = ImageRoot(Path(dataset.files[0].path).parent)
    vision = load_media(dataset[2], root, processor, limits=LIMITS, max_visual_tokens=16)
    (item,) = vision
    assert (item.is_video, item.grid[0]) == (True, 2)
    video = token_id(processor, VIDEO_TOKEN)
    encoded = encode_record(dataset[2], vision, processor, max_tokens=1000)
    assert encoded.input_ids.count(video) == item.num_tokens


def test_a_record_that_is_too_long_is_never_cut(dataset: RecordDataset, processor: EchoVLMProcessor) -> None:
    root = ImageRoot(Path(dataset.files[0].path).parent)
    vision = load_media(dataset[0], root, processor, limits=LIMITS)
    length = len(encode_record(dataset[0], vision, processor, max_tokens=1000).input_ids)
    assert len(encode_record(dataset[0], vision, processor, max_tokens=length).input_ids) == length
    with pytest.raises(TooLongError, match=f"takes {length} tokens, {vision[0].num_tokens} of them for images"):
        encode_record(dataset[0], vision, processor, max_tokens=length - 1)
    dropping = LongRecords("drop")
    found = dropping.handle(
        lambda: encode_record(dataset[0], vision, processor, max_tokens=length - 1), dataset.place(0)
    )
    assert found is None
    assert dropping.dropped == [f"{dataset.files[0].path}, line 1"]
    with pytest.raises(TooLongError):
        LongRecords("refuse").handle(lambda: encode_record(dataset[0], vision, processor, max_tokens=3), "x")


def test_a_broken_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", [record("one"), record("two", image=[])])
    with RecordDataset([path, path]) as dataset:
        assert len(dataset) == 4
        assert dataset[2].id == dataset[-4].id == "one"
        with pytest.raises(InvalidDataError, match=r"all.jsonl, line 2: marks 1 images"):
            dataset[3]
        with pytest.raises(IndexError):
            dataset[4]
