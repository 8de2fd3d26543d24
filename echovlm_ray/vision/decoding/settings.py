"""The settings of a decoder process, sent once when it starts."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Self

from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.scaling import Scaling


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """How files are decoded, and what that may take.

    Attributes:
        limits: of a file.
        scaling: frames come back at the size at which the model looks at them.
        max_memory_bytes: beyond what the process has when it starts.
    """

    limits: ImageLimits
    scaling: Scaling
    max_memory_bytes: int

    @property
    def max_frames(self) -> int:
        """The most frames that come back: an even number of a video."""
        return self.limits.max_frames + self.limits.max_frames % 2

    @property
    def max_output_bytes(self) -> int:
        """The most bytes of pixels that come back."""
        return self.max_frames * self.scaling.max_frame_pixels * 3

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            limits=ImageLimits(**fields["limits"]),
            scaling=Scaling(**fields["scaling"]),
            max_memory_bytes=fields["max_memory_bytes"],
        )
