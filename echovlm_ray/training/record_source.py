"""Files of records as training takes them: each record a chat with its pictures decoded."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from echovlm_ray.config import GatewaySection
from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.media import ImageRoot, UnusableImageError, decode_media_file
from echovlm_ray.data.parse import problems_of
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import UNKNOWN_ATTRIBUTES, UnknownClassError, read_attributes
from echovlm_ray.data.record import (
    IMAGE_MARK,
    VIDEO_MARK,
    Record,
    Role,
    Turn,
    divide_at_marks,
    language_of,
    mark_media,
    media_paths,
)
from echovlm_ray.data.splitting import Grouping
from echovlm_ray.prompts import MediumPart, Message, TextPart
from echovlm_ray.training.emphasis import emphasised
from echovlm_ray.training.examples import Example, ExampleError
from echovlm_ray.vision.images import DecodedImage, ImageLimits

_ROLES: Mapping[Role, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}


PATIENT = "patient"


class RecordSource:
    """The records of one or several files; an `ExampleSource`. They are read on access.

    Its files stay open as long as it lives; worker processes can read from it at the same time.
    """

    def __init__(
        self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], images: Path | None = None
    ) -> None:
        """Opens the files and finds their records.

        Args:
            paths: JSON or JSON Lines files.
            images: the folder that image paths start from; None: for each file the one that it lies in.

        Raises:
            ExampleError: a file cannot be read, is truncated, empty or given twice, or there is no such folder.
        """
        gateway = GatewaySection()
        self._limits = ImageLimits(
            gateway.max_image_bytes, gateway.max_image_pixels, gateway.max_frames, gateway.crop_to_regions
        )
        try:
            self._dataset = RecordDataset(paths)
            self._roots = [ImageRoot(images or file.path.parent) for file in self._dataset.files]
        except OSError as error:
            raise ExampleError(f"{error.filename}: {error.strerror or error}") from None
        except ValueError as error:
            raise ExampleError(str(error)) from None

    def __len__(self) -> int:
        """How many records all files have together."""
        return len(self._dataset)

    def place(self, index: int) -> str:
        return self._dataset.place(index)

    def group(self, index: int) -> tuple[str, str]:
        """What a record must stay together with: `PATIENT` and its patient, else "id" and its id.

        A record that cannot be read stands for itself.
        """
        record, _ = self._dataset.read(index)
        if record is None:
            return "index", str(index)
        patient = Grouping("patient").key(record)
        return ("id", record.id) if patient is None else (PATIENT, patient)

    def example(self, index: int, epoch: int) -> Example:
        """See `ExampleSource.example`; nothing is drawn at random."""
        record, problems = self._dataset.read(index)
        try:
            if record is None:
                raise ExampleError(problems[0].text)
            return example_of(record, self._roots[self._dataset.file_of(index)], self._limits)
        except ExampleError as error:
            raise ExampleError(f"{self.place(index)}: {error}") from None


def example_of(record: Record, root: ImageRoot, limits: ImageLimits) -> Example:
    """A record's chat and pictures.

    A record without any mark shows its images in the first question. A file with several frames is a video under
    either mark, and a still image is an image. Where the record has attributes, the words for them and for the
    diagnosis are the example's emphasis.

    Args:
        record: as it was read.
        root: where its images are.
        limits: of one image file.

    Raises:
        ExampleError: the record is broken, or an image cannot be used; without the record's place.
    """
    record = mark_media(record)
    if problems := problems_of(record):
        raise ExampleError(f"{problems[0].text}; see `echoray data check`")
    attributes = _attributes(record)
    paths = media_paths(record)
    decoded = [
        _decode(path, root, limits, f"image {number} of {len(paths)}") for number, path in enumerate(paths, start=1)
    ]
    rest = iter(decoded)
    answers = "\n".join(turn.text for turn in record.turns if turn.role == "gpt")
    return Example(
        messages=[_message(turn, rest) for turn in record.turns],
        pictures=[each.frames if each.is_video else each.frames[0] for each in decoded],
        emphasis=() if attributes is None else emphasised(attributes, language_of(record), answers),
        attributes=attributes,
    )


def _decode(path: str, root: ImageRoot, limits: ImageLimits, name: str) -> DecodedImage:
    try:
        return decode_media_file(root.read(path, limits.max_image_bytes), limits)
    except UnusableImageError as error:
        raise ExampleError(f"{name} {error}") from None


def _message(turn: Turn, media: Iterator[DecodedImage]) -> Message:
    content: list[TextPart | MediumPart] = []
    for piece in divide_at_marks(turn.text) if turn.role == "human" else [turn.text]:
        if piece in (IMAGE_MARK, VIDEO_MARK):
            content.append({"type": "video" if next(media).is_video else "image"})
        elif text := piece.strip():
            content.append({"type": "text", "text": text})
    return {"role": _ROLES[turn.role], "content": content}


def _attributes(record: Record) -> Attributes | None:
    if record.attributes is None:
        return None
    try:
        return read_attributes(record.attributes)
    except UnknownClassError:
        raise ExampleError(UNKNOWN_ATTRIBUTES) from None
