"""A phantom: a picture, what it shows, and which tissue each pixel is of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.phantom.anatomy import ANATOMY, Anatomy
from echovlm_ray.data.phantom.anatomy.parts import Scene
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Canvas
from echovlm_ray.data.phantom.catalogue import all_classes, draw_attributes
from echovlm_ray.data.phantom.draws import draws
from echovlm_ray.data.phantom.marker import draw_marker
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.scan import Grid, scan_of
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.data.phantom.speckle import attenuation_left, envelope, scatterers
from echovlm_ray.data.phantom.tissue import LESION_LABELS, LIVER

NOTICE = "synthetic ultrasound phantom for demonstration, not from a patient, not for diagnosis"

ImageArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """One picture with its truth.

    Attributes:
        image: 224 × 224, uint8, grey.
        attributes: what it shows.
        label_map: 224 × 224, uint8, numbers of `tissue.LABELS`.
    """

    image: ImageArray
    attributes: Attributes
    label_map: ImageArray

    @property
    def organ(self) -> Organ:
        """The region."""
        assert self.attributes.organ is not None
        return self.attributes.organ

    @property
    def class_name(self) -> str:
        """The class within the region."""
        assert self.attributes.class_name is not None
        return self.attributes.class_name


@dataclass(frozen=True, slots=True)
class Display:
    """How echoes become grey.

    Attributes:
        dynamic_range: dB from black to white.
        gain: dB, by which the picture is brighter or darker than usual.
    """

    dynamic_range: float
    gain: float


def phantom(
    seed: int,
    index: int,
    *,
    classes: Sequence[tuple[Organ, str]] | None = None,
    attributes: Attributes | None = None,
) -> Phantom:
    """One phantom, a function of its arguments alone.

    Args:
        seed: of the corpus.
        index: of the phantom. Classes take turns, so that any range of indices is balanced.
        classes: organ and name of the classes to choose from; all of them without.
        attributes: to draw instead of random ones.
    """
    if attributes is None:
        attributes = attributes_at(seed, index, classes)
    image, labels = _draw(attributes, seed, index)
    return Phantom(image, attributes, labels)


def phantoms(seed: int, indices: range, *, classes: Sequence[tuple[Organ, str]] | None = None) -> Iterator[Phantom]:
    """The phantoms of a range of indices, made one after the other as they are asked for."""
    for index in indices:
        yield phantom(seed, index, classes=classes)


def attributes_at(seed: int, index: int, classes: Sequence[tuple[Organ, str]] | None = None) -> Attributes:
    """What the phantom with this seed and index shows, without drawing it."""
    available = all_classes() if classes is None else tuple(classes)
    # Each round of all classes is in an order of its own.
    turn, place = divmod(index, len(available))
    organ, class_name = available[draws(seed, turn, "order").permutation(len(available))[place]]
    return draw_attributes(draws(seed, index, "attributes"), organ, class_name)


def cine_frames(attributes: Attributes, seed: int, index: int, frames: int) -> list[ImageArray]:
    """A loop of one cycle of motion: the heart beats, the other regions move with probe and breath."""
    return [_draw(attributes, seed, index, frame / frames)[0] for frame in range(frames)]


def patch_labels(label_map: ImageArray, patch: int = 28, lesion_share: float = 0.05) -> ImageArray:
    """The label of each patch, as training needs it for each visual token.

    Args:
        label_map: height × width, both multiples of `patch`.
        patch: pixels.
        lesion_share: a patch is of a lesion from this share on; else it is of what most of it is.
    """
    rows, columns = label_map.shape[0] // patch, label_map.shape[1] // patch
    tiles = label_map.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows, columns, -1)
    counts = np.apply_along_axis(np.bincount, 2, tiles, minlength=256)
    lesion = np.zeros(256, dtype=bool)
    lesion[list(LESION_LABELS)] = True
    of_lesion = counts[..., lesion].sum(axis=-1) >= lesion_share * patch * patch
    labels = np.where(of_lesion, np.where(lesion, counts, -1).argmax(axis=-1), counts.argmax(axis=-1))
    return np.asarray(labels, dtype=np.uint8)


def echoes(canvas: Canvas, anatomy: Anatomy, organ: Organ) -> Grid:
    """Echogenicity less the attenuation left over, dB, samples × lines."""
    left = attenuation_left(canvas.attenuation, anatomy.compensated, anatomy.optics, canvas.scan.step)
    return canvas.echo - left


def _draw(attributes: Attributes, seed: int, index: int, phase: float = 0.0) -> tuple[ImageArray, ImageArray]:
    organ = attributes.organ
    assert organ is not None
    anatomy, probe = ANATOMY[organ], REGIONS[organ].probe
    scan = scan_of(probe)
    moved = round(anatomy.motion * np.sin(2 * np.pi * phase) / scan.step)
    canvas = Canvas(scan, LIVER, (0.0, moved * scan.step))
    anatomy.draw(Scene(canvas, draws(seed, index, "anatomy"), phase), attributes)
    field = np.roll(scatterers(draws(seed, index, "speckle")), moved, axis=0)
    strength = envelope(field, echoes(canvas, anatomy, organ), probe, anatomy.optics)
    rng = draws(seed, index, "display")
    display = Display(dynamic_range=float(rng.uniform(58, 66)), gain=float(rng.uniform(-2, 2)))
    image = _grey(scan.picture(_compressed(strength, display)), scan.inside)
    if attributes.side is not None:
        draw_marker(image, organ, attributes.side, "left" if rng.random() < 0.5 else "right")
    return image, scan.labels(canvas.labels)


def _compressed(strength: Grid, display: Display) -> Grid:
    """Log compression to grey, 0 dB a little below the middle."""
    decibels = 20 * np.log10(np.maximum(strength, np.float32(1e-6)))
    grey = (decibels + np.float32(display.gain)) / np.float32(display.dynamic_range) + np.float32(0.46)
    compressed: Grid = np.clip(grey * np.float32(255), 0, 255)
    return compressed


def _grey(picture: Grid, inside: npt.NDArray[np.bool_]) -> ImageArray:
    return np.where(inside, np.rint(picture), 0).astype(np.uint8)
