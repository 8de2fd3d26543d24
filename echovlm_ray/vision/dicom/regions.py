"""Ultrasound regions: which part of a DICOM picture is image, and not text, colour bars and patient names.

DICOM PS3.3 C.8.5.5. `BurnedInAnnotation` is not used: it is NO in many pictures that do show text.
"""

from pydicom import Dataset

from echovlm_ray.vision.dicom.attributes import has, integer, items

# Region Spatial Format: waveforms (ECG), graphics and "none". 2D, M-mode and spectral are images, and a format that is
# missing or unknown may be.
NO_IMAGE_FORMATS = frozenset((0, 4, 5))
# A smaller crop than this is not a picture: such regions are wrong, and the picture is not cropped.
MIN_SIDE = 32
# A region that is smaller in one direction is a mistake or a mark; no picture, M-mode or spectrum is.
MIN_REGION_SIDE = 8
MIN_AREA_SHARE = 1 / 16
_CORNERS = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
_SEQUENCE = "Sequence of Ultrasound Regions (0018,6011)"
_NOT_CROPPED = "so that the picture is not cropped and may show burned-in text"

Box = tuple[int, int, int, int]


def image_box(dataset: Dataset, width: int, height: int, notices: list[str]) -> Box | None:
    """The smallest box around all image regions, clamped to the picture.

    Args:
        dataset: the object.
        width: of the picture, pixels.
        height: likewise.
        notices: regions that were left out, and a picture that was not cropped because of them, are added here.

    Returns:
        left, top, right, bottom, the last two exclusive; None to keep the whole picture: there are no image regions,
        or what they leave is too small to be believed.
    """
    if not has(dataset, "SequenceOfUltrasoundRegions"):
        return None
    regions = items(dataset, "SequenceOfUltrasoundRegions")
    images = [region for region in regions if integer(region, "RegionSpatialFormat") not in NO_IMAGE_FORMATS]
    boxes = [box for region in images if (box := _clamped(region, width, height)) is not None]
    left_out = len(images) - len(boxes)
    if any(_is_odd(region, width, height) for region in images):
        notices.append(f"has a {_SEQUENCE} with corners that are reversed or outside the picture; they are put right")
    if not boxes:
        if left_out:
            notices.append(f"has a {_SEQUENCE} in which no image region lies within the picture, {_NOT_CROPPED}")
        elif regions:
            notices.append(f"has a {_SEQUENCE} without an image region, {_NOT_CROPPED}")
        else:
            notices.append(f"has a {_SEQUENCE} that is empty or cannot be read, {_NOT_CROPPED}")
        return None
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    if min(right - left, bottom - top) < MIN_SIDE or (right - left) * (bottom - top) < MIN_AREA_SHARE * width * height:
        notices.append(f"has a {_SEQUENCE} whose image regions are too small to be the picture, {_NOT_CROPPED}")
        return None
    if left_out:
        notices.append(f"has {left_out} image regions without a location in the picture, which are left out")
    return left, top, right, bottom


def _corners(region: Dataset) -> tuple[int, ...]:
    """Left, top, right, bottom; empty where one is missing, or where there is no lower right one."""
    corners = [integer(region, keyword) for keyword in _CORNERS]
    known = tuple(_signed(corner) for corner in corners if corner is not None)
    return known if len(known) == len(_CORNERS) and min(known[2:]) >= 0 and any(known[2:]) else ()


def _is_odd(region: Dataset, width: int, height: int) -> bool:
    known = _corners(region)
    if not known or _clamped(region, width, height) is None:
        return False
    left, top, right, bottom = known
    # One pixel too far is how some devices count.
    return left > right or top > bottom or min(known) < 0 or right > width or bottom > height


def _clamped(region: Dataset, width: int, height: int) -> Box | None:
    known = _corners(region)
    if not known:
        return None
    # Reversed corners are the same region. The standard's lower right corner belongs to it.
    left, right = max(0, min(known[0], known[2])), min(width, max(known[0], known[2]) + 1)
    top, bottom = max(0, min(known[1], known[3])), min(height, max(known[1], known[3]) + 1)
    return (left, top, right, bottom) if min(right - left, bottom - top) >= MIN_REGION_SIDE else None


def _signed(corner: int) -> int:
    """A corner left of or above the picture, written into the unsigned 32 bits of the attribute."""
    return corner - 0x1_0000_0000 if corner >= 0x8000_0000 else corner
