"""What a caller gets of an answer while it is written: the same on both sides of a transport."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accepted:
    """The images are decoded and the request is under way; the first event.

    Attributes:
        prompt_tokens: length of the whole prompt, visual tokens included.
        visual_tokens: how many of them stand for images.
        frames: frames taken of each image, in order; 1 for a still image.
    """

    prompt_tokens: int
    visual_tokens: int
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Further text of the answer: whole characters only."""

    text: str
