"""A decoder's answer, and what the gateway checks of it.

A decoder reads hostile bytes and may be controlled by their sender. So its answer is JSON of known fields, and
nothing of it is used that has not been checked (P17).
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echovlm_ray.vision.decoding.job import (
    MAX_ANSWER_BYTES,
    MAX_REFUSAL_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    MAX_TEXTS,
)
from echovlm_ray.vision.decoding.settings import DecoderSettings

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
Texts = Annotated[tuple[Text, ...], Field(max_length=MAX_TEXTS)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class WrongAnswerError(RuntimeError):
    """An answer that no sound decoder gives. The text quotes nothing of it."""


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Picture(_Checked):
    """A decoded file; see `DecodedImage`. Its frames lie one after the other in the shared memory."""

    num_frames: Count
    height: Count
    width: Count
    frames_taken: Count
    source_frames: Count
    anatomy_terms: Texts
    notices: Texts


class Answer(_Checked):
    """The result of a file: exactly one of the three.

    Attributes:
        picture: it was decoded.
        refused: what is wrong with the file.
        out_of_memory: decoding took more memory than it may.
    """

    picture: Picture | None = None
    refused: Annotated[str, Field(max_length=MAX_REFUSAL_CHARACTERS)] | None = None
    out_of_memory: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.picture is not None) + (self.refused is not None) + self.out_of_memory != 1:
            raise ValueError("exactly one of the fields must be set")
        return self


def read_answer(packet: bytes, settings: DecoderSettings) -> Answer:
    """Reads and checks an answer.

    Raises:
        WrongAnswerError: it is too long, has other fields, or a picture that the settings do not allow.
    """
    if len(packet) > MAX_ANSWER_BYTES:
        raise WrongAnswerError("it is too long")
    try:
        answer = Answer.model_validate_json(packet)
    except ValidationError:
        raise WrongAnswerError("its fields are not those of an answer") from None
    picture, scaling = answer.picture, settings.scaling
    if picture is not None:
        if picture.height % scaling.side or picture.width % scaling.side:
            raise WrongAnswerError("its frames are not of a scaled size")
        if picture.height * picture.width > scaling.max_frame_pixels or picture.num_frames > settings.max_frames:
            raise WrongAnswerError("its frames do not fit into the shared memory")
    return answer
