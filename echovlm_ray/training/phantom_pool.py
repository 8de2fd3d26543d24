"""A pool of phantoms, drawn in advance by several processes and stored as arrays, for use in many epochs."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from echovlm_ray.checkpoint.atomic import new_folder
from echovlm_ray.data.phantom.catalogue import UnknownClassError, select_classes
from echovlm_ray.data.phantom.phantom import attributes_at, cine_frames, patch_labels, phantom
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.recipe import PhantomSection

LOOP_FRAMES = 8
_SIDE = 224
# Pixels of one visual token, in both directions.
_TOKEN = 28
_CHUNK = 32
_ARRAYS = ("pictures", "tissue", "loops")
_FACTS = "about.json"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class PhantomPool:
    """The pictures of one section of a recipe.

    Attributes:
        section: what was drawn.
        classes: organ and name of the classes that take turns.
        pictures_NHW: uint8; a memory map, like the others.
        tissue_NRC: uint8, the label of each visual token of a picture.
        loops_LFHW: uint8.
    """

    section: PhantomSection
    classes: tuple[tuple[Organ, str], ...]
    pictures_NHW: Bytes
    tissue_NRC: Bytes
    loops_LFHW: Bytes

    @classmethod
    def open(
        cls,
        folder: Path,
        section: PhantomSection,
        *,
        workers: int | None = None,
        start: Callable[[int], None] = lambda _: None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Opens a pool; draws it where it is not there yet.

        Args:
            folder: the pool's own; it appears when everything is drawn.
            section: what to draw.
            workers: processes; None: one for each core.
            start: called with the number of pictures to draw, unless all are there.
            progress: called with the number of pictures drawn since the last call.

        Raises:
            ExampleError: the section leaves no class, or names one that there is not.
            TrainingError: the folder contains other phantoms.
        """
        try:
            classes = select_classes(section.organs, exclude=section.exclude)
        except UnknownClassError as error:
            raise ExampleError(f"data.phantoms: {error}") from None
        facts = section.model_dump(mode="json", include={"seed", "first", "pictures", "loops", "organs", "exclude"})
        if not folder.is_dir():
            start(section.pictures + section.loops * LOOP_FRAMES)
            with new_folder(folder) as partial_folder:
                _draw(partial_folder, section, classes, workers, progress)
                (partial_folder / _FACTS).write_text(json.dumps(facts) + "\n")
        elif json.loads((folder / _FACTS).read_text()) != facts:
            raise TrainingError(f"{folder} holds phantoms of another recipe: remove it, or give another folder")
        # An empty file cannot be mapped.
        arrays = [
            np.load(folder / f"{name}.npy", mmap_mode="r" if section.loops or name != "loops" else None)
            for name in _ARRAYS
        ]
        return cls(section, classes, *arrays)


def _draw(
    folder: Path,
    section: PhantomSection,
    classes: tuple[tuple[Organ, str], ...],
    workers: int | None,
    progress: Callable[[int], None],
) -> None:
    pictures = np.empty((section.pictures, _SIDE, _SIDE), dtype=np.uint8)
    tissue = np.empty((section.pictures, _SIDE // _TOKEN, _SIDE // _TOKEN), dtype=np.uint8)
    loops = np.empty((section.loops, LOOP_FRAMES, _SIDE, _SIDE), dtype=np.uint8)
    count = min(workers or os.cpu_count() or 1, section.pictures)
    # Forked processes could inherit locks of a threaded caller.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        still = partial(_still, section.seed, classes)
        for number, drawn in enumerate(pool.map(still, section.picture_indices, chunksize=_CHUNK)):
            pictures[number], tissue[number] = drawn
            progress(1)
        loop = partial(_loop, section.seed, classes)
        for number, frames in enumerate(pool.map(loop, section.loop_indices, chunksize=_CHUNK // LOOP_FRAMES)):
            loops[number] = frames
            progress(LOOP_FRAMES)
    for name, array in zip(_ARRAYS, (pictures, tissue, loops), strict=True):
        np.save(folder / f"{name}.npy", array)


def _still(seed: int, classes: tuple[tuple[Organ, str], ...], index: int) -> tuple[Bytes, Bytes]:
    found = phantom(seed, index, classes=classes)
    return found.image, patch_labels(found.label_map, _TOKEN)


def _loop(seed: int, classes: tuple[tuple[Organ, str], ...], index: int) -> Bytes:
    return np.stack(cine_frames(attributes_at(seed, index, classes), seed, index, LOOP_FRAMES))
