"""Records to token ids with their labels, whole or not at all: nothing is ever cut off.

A cut could fall between an image's tokens, and the model would then read half an image; so a record that is too long is
refused, or dropped, counted and named.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.record import IMAGE_MARK, VIDEO_MARK, InvalidDataError, Record, Turn
from echovlm_ray.model.processing import TURN_END, EchoVLMProcessor, VisionPatches
from echovlm_ray.prompts import MediumPart, Message, TextPart
from echovlm_ray.vision.images import ImageLimits, decode_image_file

# What a loss leaves out.
IGNORED = -100
_MARK = re.compile(f"({re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)})")
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}


class TooLongError(InvalidDataError):
    """A record takes more tokens than are allowed."""

    def __init__(self, num_tokens: int, num_visual: int, max_tokens: int) -> None:
        """Takes the record's tokens, how many of them stand for images, and the limit."""
        super().__init__(
            f"takes {num_tokens} tokens, {num_visual} of them for images, and the limit is {max_tokens}: allow more, "
            "or use fewer or smaller images; a record is never cut"
        )
        self.num_tokens = num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRecord:
    """A record as a causal language model learns it.

    Attributes:
        input_ids: of the whole conversation.
        labels: the same, and `IGNORED` where no answer stands; an answer's end token is part of it.
        vision: the images and videos in the order of their placeholders.
    """

    input_ids: list[int]
    labels: list[int]
    vision: list[VisionPatches]


@dataclass(slots=True)
class LongRecords:
    """What becomes of records that are too long.

    Attributes:
        policy: "refuse" raises `TooLongError`; "drop" leaves the record out.
        dropped: the places of those that were left out, as `RecordDataset.place` names them.
    """

    policy: Literal["refuse", "drop"] = "refuse"
    dropped: list[str] = field(default_factory=list)

    def handle(self, encode: Callable[[], EncodedRecord], place: str) -> EncodedRecord | None:
        """The encoded record, or None where it was dropped.

        Raises:
            TooLongError: it is too long and the policy is to refuse.
        """
        try:
            return encode()
        except TooLongError:
            if self.policy == "refuse":
                raise
            self.dropped.append(place)
            return None


def load_media(
    record: Record,
    root: ImageRoot,
    processor: EchoVLMProcessor,
    *,
    limits: ImageLimits,
    max_visual_tokens: int | None = None,
) -> list[VisionPatches]:
    """A record's images and videos in the order of their marks, decoded as the gateway does.

    A DICOM cine loop becomes a video under either mark; a still image under a `<video>` mark is shown as an image.

    Raises:
        UnusableImageError: a file is missing or leads out of the root.
        InvalidRequestError: a file cannot be decoded.
    """
    vision = []
    for number, path in enumerate(media_paths(record)):
        content = root.read(path, limits.max_image_bytes)
        decoded = decode_image_file(content, limits=limits, field=f"image {number + 1}")
        if decoded.is_video:
            vision.append(processor.video_patches(decoded.frames, max_visual_tokens=max_visual_tokens))
        else:
            vision.append(processor.image_patches(decoded.frames[0], max_visual_tokens=max_visual_tokens))
    return vision


def media_paths(record: Record) -> list[str]:
    """The paths of images and videos in the order in which the questions mark them."""
    rest = {IMAGE_MARK: iter(record.images), VIDEO_MARK: iter(record.videos)}
    return [next(rest[mark]) for turn in record.turns if turn.role == "human" for mark in _MARK.findall(turn.text)]


def encode_record(
    record: Record, vision: Sequence[VisionPatches], processor: EchoVLMProcessor, *, max_tokens: int
) -> EncodedRecord:
    """Token ids and labels of a whole record.

    Args:
        record: a valid one; each mark becomes its medium's placeholders where it stands.
        vision: see `load_media`.
        processor: of the checkpoint.
        max_tokens: visual tokens included.

    Raises:
        TooLongError: it does not fit.
    """
    media = iter(vision)
    messages = [_message(turn, media) for turn in record.turns]
    beginning = len(processor.encode_chat([], []))
    # Without the generation prompt that encode_chat ends with.
    input_ids = processor.encode_chat(messages, vision)[:-beginning]
    if len(input_ids) > max_tokens:
        raise TooLongError(len(input_ids), sum(item.num_tokens for item in vision), max_tokens)
    labels = [IGNORED] * len(input_ids)
    end_id = processor.tokenizer.get_vocab()[TURN_END]
    for number, turn in enumerate(record.turns):
        if turn.role == "gpt":
            shown = [part for message in messages[:number] for part in message["content"] if part["type"] != "text"]
            start = len(processor.encode_chat(messages[:number], vision[: len(shown)]))
            end = start + len(processor.encode_text(turn.text)) + 1
            assert input_ids[end - 1] == end_id
            labels[start:end] = input_ids[start:end]
    return EncodedRecord(input_ids, labels, list(vision))


def _message(turn: Turn, media: Iterator[VisionPatches]) -> Message:
    if turn.role != "human":
        return {"role": _ROLES[turn.role], "content": [{"type": "text", "text": turn.text}]}
    content: list[TextPart | MediumPart] = []
    for piece in _MARK.split(turn.text):
        if _MARK.fullmatch(piece):
            content.append({"type": "video" if next(media).is_video else "image"})
        elif text := piece.strip():
            content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}
