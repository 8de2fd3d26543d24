"""A vessel in long section under a linear probe."""

from collections.abc import Callable

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, muscle_band, skin
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Profile, Shape
from echovlm_ray.data.phantom.scan import Grid
from echovlm_ray.data.phantom.tissue import BLOOD, MUSCLE, SUBCUTANEOUS, VESSEL_WALL, Tissue, bright, solid

COMPENSATED = 0.85
_BLOOD = Tissue(BLOOD.label, BLOOD.echo, COMPENSATED)
# Share of the diameter that both plaques together take.
_REDUCTION = {"below_50": (0.26, 0.38), "50_to_69": (0.56, 0.63), "70_or_more": (0.78, 0.86)}


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a vessel with these attributes."""
    canvas = scene.canvas
    canvas.fill(canvas.band(-1.0, 2.0), Tissue(MUSCLE.label, -4.0, COMPENSATED))
    canvas.raise_echo(canvas.band(-1.0, 2.0), 2.0 * canvas.noise(scene.rng, 6, 12))
    canvas.fill(canvas.band(-1.0, 0.1), Tissue(SUBCUTANEOUS.label, SUBCUTANEOUS.echo, COMPENSATED))
    skin(scene)
    muscle_band(scene, 0.09, 0.24)
    lumen = attributes["lumen"]
    half = scene.between(0.115, 0.135)
    course = _course(scene, {"filled": 0.68, "dilated": 0.54}.get(lumen, 0.52))
    if lumen == "filled":
        _thrombosed_vein(scene, course)
    elif lumen == "dilated":
        _aneurysm(scene, attributes["form"], course)
    else:
        _wall(scene, course, lambda x: np.full_like(x, half), lambda x: np.full_like(x, half))
        if attributes["plaque"] != "none":
            _plaques(scene, attributes, course, half)


def _course(scene: Scene, z: float) -> Profile:
    """The middle of the vessel."""
    slope, bend, phase = scene.between(-0.06, 0.06), scene.between(-0.012, 0.012), scene.between(0, 6.28)
    pulse = 0.004 * np.sin(2 * np.pi * scene.phase)

    def middle(x: Grid) -> Grid:
        line: Grid = (
            np.float32(z + pulse) + np.float32(slope) * x + np.float32(bend) * np.sin(6 * x + np.float32(phase))
        )
        return line

    return middle


def _lumen(scene: Scene, course: Profile, above: Profile, below: Profile) -> Shape:
    return scene.canvas.band(lambda x: course(x) - above(x), lambda x: course(x) + below(x))


def _wall(scene: Scene, course: Profile, above: Profile, below: Profile) -> None:
    """Lumen and wall: bright intima, dark media, bright adventitia."""
    canvas = scene.canvas
    thickness = np.float32(0.022)
    outer = _lumen(scene, course, lambda x: above(x) + thickness, lambda x: below(x) + thickness)
    canvas.fill(outer, Tissue(VESSEL_WALL.label, -16.0, COMPENSATED))
    canvas.edge(outer, VESSEL_WALL.echo + 4, 0.009)
    inner = _lumen(scene, course, above, below)
    canvas.fill(inner, _BLOOD)
    canvas.edge(inner, VESSEL_WALL.echo - 3, 0.005)


def _bump(centre: float, length: float) -> Callable[[Grid], Grid]:
    """A smooth hill of height 1."""

    def hill(x: Grid) -> Grid:
        share = np.clip((x - np.float32(centre)) / np.float32(length), -1, 1)
        height: Grid = (1 - share * share) ** np.float32(0.75)
        return height

    return hill


def _plaques(scene: Scene, attributes: Attributes, course: Profile, half: float) -> None:
    canvas = scene.canvas
    low, high = _REDUCTION[attributes["reduction"]]
    both = attributes["wall"] == "both"
    taken = scene.between(low, high) * 2 * half
    length = scene.between(0.19, 0.24) if both else scene.between(0.14, 0.19)
    hill = _bump(scene.between(-0.12, 0.12), length)
    kind = attributes["plaque"]
    for wall in ("near", "far"):
        if not both and attributes["wall"] != wall:
            continue
        height = np.float32(taken / 2 if both else taken)
        near = wall == "near"

        def top(x: Grid, near: bool = near, height: np.float32 = height) -> Grid:
            return course(x) + (-half if near else half - height * hill(x))

        def bottom(x: Grid, near: bool = near, height: np.float32 = height) -> Grid:
            return course(x) + (height * hill(x) - half if near else half)

        shape = _where_it_is_high(scene, canvas.band(top, bottom), hill)
        if kind == "calcified":
            _calcified(scene, shape, _where_it_is_high(scene, canvas.band(lambda x: top(x) + 0.03, bottom), hill))
        else:
            canvas.fill(shape, solid(2.0 if kind == "echogenic" else -17.0, COMPENSATED))
            canvas.edge(shape, 9.0 if kind == "echogenic" else 5.0, 0.005)


def _where_it_is_high(scene: Scene, shape: Shape, hill: Profile) -> Shape:
    """The part of a shape under a hill: outside the hill the shape has no height, but is not empty."""
    high = hill(scene.canvas.x[:1]) > 0
    return Shape(shape.window, np.where(high, shape.distance, np.float32(1.0)))


def _calcified(scene: Scene, shape: Shape, core: Shape) -> None:
    """A bright plaque with a full shadow below its surface."""
    canvas = scene.canvas
    canvas.fill(shape, bright(17.0, COMPENSATED))
    canvas.attenuate(core, 30.0)


def _aneurysm(scene: Scene, form: str, course: Profile) -> None:
    canvas = scene.canvas
    half = np.float32(scene.between(0.085, 0.095))
    centre = scene.between(-0.06, 0.06)
    if form == "fusiform":
        hill = _bump(centre, scene.between(0.29, 0.33))
        more = np.float32(scene.between(0.125, 0.14))

        def radius(x: Grid) -> Grid:
            return half + more * hill(x) ** np.float32(1.5)

        _wall(scene, course, radius, radius)
        return
    _wall(scene, course, lambda x: np.full_like(x, half), lambda x: np.full_like(x, half))
    size = scene.between(0.135, 0.15)
    z = float(course(np.array([centre], dtype=np.float32))[0]) + float(half) + size * 0.82
    sac = canvas.blob(centre, z, size, size * 0.95)
    canvas.fill(
        canvas.blob(centre, z, size + 0.022, size * 0.95 + 0.022), Tissue(VESSEL_WALL.label, -16.0, COMPENSATED)
    )
    canvas.edge(canvas.blob(centre, z, size + 0.022, size * 0.95 + 0.022), VESSEL_WALL.echo + 4, 0.009, specular=0.4)
    canvas.fill(sac, _BLOOD)
    canvas.edge(sac, VESSEL_WALL.echo - 3, 0.005, specular=0.4)
    canvas.fill(_lumen(scene, course, lambda x: np.full_like(x, half), lambda x: np.full_like(x, half)), _BLOOD)


def _thrombosed_vein(scene: Scene, course: Profile) -> None:
    """A clear artery above, and below it a wide vein that low-level echoes fill."""
    canvas = scene.canvas

    def artery(x: Grid) -> Grid:
        return course(x) - np.float32(0.29)

    half = scene.between(0.065, 0.075)
    _wall(scene, artery, lambda x: np.full_like(x, half), lambda x: np.full_like(x, half))
    wide = np.float32(scene.between(0.145, 0.16))
    vein = _lumen(scene, course, lambda x: np.full_like(x, wide), lambda x: np.full_like(x, wide))
    canvas.fill(vein, Tissue(solid(0, 0).label, -15.0, COMPENSATED))
    canvas.raise_echo(vein, 4.0 * canvas.noise(scene.rng, 12, 24))
    canvas.edge(vein, VESSEL_WALL.echo - 1, 0.007)
