"""Ultrasound regions: which part of a DICOM picture is image, and not text, colour bars and patient names.

DICOM PS3.3 C.8.5.5. `BurnedInAnnotation` is not asked: it says NO on pictures that do show text.
"""

from typing import Any

# Region Spatial Format: 2D, M-mode, spectral. Waveforms (ECG), graphics and "none" are no image.
IMAGE_FORMATS = frozenset((1, 2, 3))
# A smaller crop than this is no picture: such regions are wrong, and the whole picture is kept.
MIN_SIDE = 32
MIN_AREA_SHARE = 1 / 16


def image_box(dataset: Any, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The smallest box around all image regions, clamped to the picture.

    Args:
        dataset: a pydicom dataset.
        width: of the picture, pixels.
        height: likewise.

    Returns:
        left, top, right, bottom, the last two exclusive; None to keep the whole picture: there are no image regions,
        or what they leave is too small to be believed.
    """
    boxes = [
        box
        for region in dataset.get("SequenceOfUltrasoundRegions", None) or ()
        if region.get("RegionSpatialFormat", None) in IMAGE_FORMATS and (box := _clamped(region, width, height))
    ]
    if not boxes:
        return None
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    if min(right - left, bottom - top) < MIN_SIDE:
        return None
    if (right - left) * (bottom - top) < MIN_AREA_SHARE * width * height:
        return None
    return left, top, right, bottom


def _clamped(region: Any, width: int, height: int) -> tuple[int, int, int, int] | None:
    left = max(0, int(region.RegionLocationMinX0))
    top = max(0, int(region.RegionLocationMinY0))
    # The standard's lower right corner belongs to the region.
    right = min(width, int(region.RegionLocationMaxX1) + 1)
    bottom = min(height, int(region.RegionLocationMaxY1) + 1)
    return (left, top, right, bottom) if left < right and top < bottom else None
