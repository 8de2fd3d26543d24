"""Contact sheets: many phantoms on one picture, with what they show, and that they are synthetic."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from echovlm_ray.data.phantom.phantom import NOTICE, Phantom

_CAPTION, _HEADER = 13, 18
_TEXT, _LINE = 255, 90


def contact_sheet(rows: Sequence[tuple[str, Sequence[Phantom]]], side: int = 224) -> Image.Image:
    """A sheet, grey.

    Args:
        rows: a caption and the phantoms of each row.
        side: of each picture, pixels.
    """
    columns = max(len(phantoms) for _, phantoms in rows)
    height = _HEADER + len(rows) * (side + _CAPTION)
    sheet = Image.new("L", (columns * side, height))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), f"{NOTICE[0].upper()}{NOTICE[1:]}.", fill=_TEXT)
    for number, (caption, phantoms) in enumerate(rows):
        top = _HEADER + number * (side + _CAPTION)
        draw.line([(0, top), (columns * side, top)], fill=_LINE)
        draw.text((4, top + 1), caption, fill=_TEXT)
        for column, phantom in enumerate(phantoms):
            picture = Image.fromarray(phantom.image).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (column * side, top + _CAPTION))
    return sheet


def caption_of(phantom: Phantom) -> str:
    """Organ and class, as options name them."""
    return f"{phantom.organ}/{phantom.class_name}"
