"""Three baselines that do not use the image: a blank image, another record's images, and the commonest answer.

The value of a model is its difference to the baselines.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image

from echovlm_ray.data.draws import epoch_order
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.evaluation.items import Item, attributes_key

# The variants that are compared; all but the last are answered by the model.
Variant = Literal["model", "blank image", "shuffled images", "commonest report"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ASKED: tuple[Variant, ...] = VARIANTS[:3]


def blank_image(width: int, height: int) -> bytes:
    """A black PNG: only the background of an ultrasound image."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shuffled(items: Sequence[Item], seed: int) -> list[int]:
    """For each item another one whose images are sent instead, by the seed; never one with the same images.

    Raises:
        InvalidDataError: all have the same images, so there are no others to show.
    """
    with_media = [index for index, item in enumerate(items) if item.media]
    if len({items[index].media for index in with_media}) < 2:
        raise InvalidDataError("all records show the same images: the baseline of shuffled images needs others")
    order = [with_media[place] for place in epoch_order(len(with_media), seed, 0)]
    partners = list(range(len(items)))
    for place, index in enumerate(order):
        step = 1
        while items[order[(place + step) % len(order)]].media == items[index].media:
            step += 1
        partners[index] = order[(place + step) % len(order)]
    return partners


def commonest_answers(items: Sequence[Item]) -> list[str]:
    """For each item the right answer that is most frequent among those of its organ, task and language.

    Answers are equal if they state the same attributes, or else if they have the same words; only answers to the same
    question are compared. They are taken from the evaluated records, so no constant answer can score higher.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[_group(item)].append(index)
    answers = [""] * len(items)
    for members in groups.values():
        meanings = [_meaning(items[index]) for index in members]
        most = max(Counter(meanings).items(), key=lambda entry: (entry[1], entry[0]))[0]
        text = items[members[meanings.index(most)]].references[0]
        for index in members:
            answers[index] = text
    return answers


def _group(item: Item) -> tuple[str, ...]:
    asked = item.question.text if item.question is not None else item.request.prompt if item.kind == "question" else ""
    return item.organ, item.task, item.language, asked


def _meaning(item: Item) -> str:
    if item.attributes is None or item.question is not None:
        return item.references[0]
    if item.states and "values" not in item.states:
        return str(item.attributes.class_name)
    return attributes_key(item.attributes)
