"""Contact sheets: many phantoms on one picture, with what they show, and that they are synthetic."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from echovlm_ray.data.phantom.phantom import NOTICE, Phantom

_CAPTION, _HEADER, _GAP = 14, 18, 6
_TEXT = 255


def contact_sheet(groups: Sequence[tuple[str, Sequence[Phantom]]], side: int = 176, across: int = 2) -> Image.Image:
    """A sheet, grey.

    Args:
        groups: a caption and the phantoms of each class.
        side: of each picture, pixels.
        across: how many classes stand side by side.
    """
    columns = max(len(phantoms) for _, phantoms in groups)
    across = min(across, len(groups))
    group_width, group_height = columns * side + _GAP, side + _CAPTION
    size = (across * group_width, _HEADER + -(-len(groups) // across) * group_height)
    sheet = Image.new("L", size)
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), f"{NOTICE[0].upper()}{NOTICE[1:]}.", fill=_TEXT)
    for number, (caption, phantoms) in enumerate(groups):
        row, column = divmod(number, across)
        left, top = column * group_width, _HEADER + row * group_height
        draw.text((left + 4, top + 1), caption, fill=_TEXT)
        for place, phantom in enumerate(phantoms):
            picture = Image.fromarray(phantom.image).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + place * side, top + _CAPTION))
    return sheet
