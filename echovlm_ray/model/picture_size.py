"""The limits of an image's size in a checkpoint's preprocessor_config.json."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from echovlm_ray.model.picture_settings import DEFAULT_MAX_PIXELS, DEFAULT_MIN_PIXELS, PictureSettings

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


@dataclass(frozen=True, slots=True)
class PictureSize:
    """The limits in a checkpoint's preprocessor_config.json.

    Attributes:
        min_pixels: smaller pictures are scaled up to this.
        max_pixels: larger ones are scaled down to this.
        side: the side of the square of pixels of one visual token.
    """

    min_pixels: int
    max_pixels: int
    side: int

    @classmethod
    def of(cls, processor: "PictureSettings | Qwen2VLImageProcessorPil") -> Self:
        """Reads them as either of their names, in `size` or beside it.

        Raises:
            ValueError: a number is missing, not an integer, or contradicts another; the text names it.
        """
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            _positive(name, getattr(processor, name, None))
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(processor, name, True):
                raise ValueError(f"preprocessor_config.json has {name} false, and Qwen2-VL needs it: set it to true")
        size = {name: value for name, value in dict(processor.size).items() if value is not None}
        low, high = (
            next((size[name] for name in names if name in size), default)
            for names, default in (
                (("shortest_edge", "min_pixels"), DEFAULT_MIN_PIXELS),
                (("longest_edge", "max_pixels"), DEFAULT_MAX_PIXELS),
            )
        )
        found = cls(
            _positive("min_pixels", low), _positive("max_pixels", high), processor.patch_size * processor.merge_size
        )
        if size.keys() & {"height", "width"}:
            raise ValueError(
                "preprocessor_config.json has a size of fixed height and width; Qwen2-VL takes pictures of any size: "
                "give min_pixels and max_pixels"
            )
        if found.min_pixels > found.max_pixels:
            raise ValueError(
                f"preprocessor_config.json has min_pixels (size.shortest_edge) {found.min_pixels} above max_pixels "
                f"(size.longest_edge) {found.max_pixels}: lower the first or raise the second"
            )
        if found.max_pixels < found.side**2:
            raise ValueError(
                f"preprocessor_config.json has max_pixels (size.longest_edge) {found.max_pixels}, and one visual token "
                f"takes {found.side**2}: raise it"
            )
        return found


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"preprocessor_config.json has {name} {value!r}; it must be a whole number above 0")
    return value
