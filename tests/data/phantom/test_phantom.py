"""Whole phantoms: the same seed the same bytes, signs of the right direction, labels and words that fit the picture."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets, select_classes
from echovlm_ray.data.phantom.flips import NotMirroredError, flip
from echovlm_ray.data.phantom.phantom import Phantom, attributes_at, cine_frames, patch_labels, phantom, phantoms
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.data.phantom.tissue import LABELS, LESION_LABELS
from echovlm_ray.data.phantom.wording.render import render

CLASSES = all_classes()
# Pictures that any machine draws alike, but for the last bit of a rounding; attributes are exact.
FEW = range(4)


def drawn(organ: Organ, class_name: str, index: int = 0, **values: str) -> Phantom:
    """A phantom of a class with some values fixed."""
    wanted = next(
        attributes
        for attributes in attribute_sets(organ, class_name)
        if all(attributes.get(name) == value for name, value in values.items())
    )
    return phantom(5, index, attributes=wanted)


def lesion_of(found: Phantom) -> npt.NDArray[np.bool_]:
    return np.isin(found.label_map, list(LESION_LABELS))


def behind_and_beside(found: Phantom) -> tuple[float, float]:
    """Mean grey behind the lesion, and beside that at the same depth, in the same tissue."""
    rows, columns = np.nonzero(lesion_of(found))
    bottom, left, right = int(rows.max()) + 4, int(columns.min()), int(columns.max())
    middle, width = (left + right) // 2, max((right - left) // 5, 2)
    band = slice(bottom, min(bottom + 22, 160))
    label = np.bincount(found.label_map[band, middle - width : middle + width].ravel()).argmax()
    image, same = found.image[band].astype(float), found.label_map[band] == label
    columns_of = np.arange(224)
    near = np.abs(columns_of - middle) <= width
    away = (columns_of < left - 14) | (columns_of > right + 14)
    return float(image[same & near].mean()), float(image[same & away].mean())


def test_the_same_arguments_give_the_same_bytes() -> None:
    for index in FEW:
        first, second = phantom(3, index), phantom(3, index)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.label_map.tobytes() == second.label_map.tobytes()
        assert first.attributes == second.attributes


def test_no_phantom_depends_on_those_before_it() -> None:
    in_a_row = [found.image.tobytes() for found in phantoms(3, range(6))]
    backwards = [phantom(3, index).image.tobytes() for index in reversed(range(6))]
    assert in_a_row == backwards[::-1]


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib; from echovlm_ray.data.phantom.phantom import phantom;"
        "print(hashlib.sha256(b''.join(phantom(9, index).image.tobytes() for index in (4, 2))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(phantom(9, index).image.tobytes() for index in (4, 2))).hexdigest()
    assert done.stdout.strip() == here


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tobytes()  # type: ignore[index]
    phantom(0, 0)
    assert np.random.get_state()[1].tobytes() == before  # type: ignore[index]


def test_seeds_and_indices_differ() -> None:
    images = {phantom(seed, index, classes=[("liver", "normal")]).image.tobytes() for seed in FEW for index in FEW}
    assert len(images) == len(FEW) ** 2


def test_classes_take_turns() -> None:
    turns = [[attributes_at(1, turn * len(CLASSES) + place) for place in range(len(CLASSES))] for turn in range(3)]
    for turn in turns:
        assert {(found.organ, found.class_name) for found in turn} == set(CLASSES)
    assert turns[0] != turns[1]


@pytest.mark.parametrize(("organ", "name"), CLASSES)
def test_every_attribute_of_every_class_can_be_drawn(organ: Organ, name: str) -> None:
    without_marker = [found for found in attribute_sets(organ, name) if found.side is None]
    for index, attributes in enumerate(without_marker):
        found = phantom(2, index, attributes=attributes)
        assert found.image.shape == found.label_map.shape == (224, 224)
        assert found.image.dtype == found.label_map.dtype == np.uint8
        assert found.label_map.max() < len(LABELS)
        assert 20 < found.image[found.label_map > 0].mean() < 160
        values = attributes.values
        has_lesion = values.get("lesion", "none") != "none" or values.get("plaque", "none") != "none"
        shown = lesion_of(found).mean()
        assert bool(shown > 0.0006) == (has_lesion or name in ("apical_thrombus", "thrombus") or "hydro" in name), (
            attributes
        )


@pytest.mark.parametrize(
    ("organ", "name"), [("breast", "simple_cyst"), ("liver", "simple_cyst"), ("gynaecology", "unilocular_cyst")]
)
@pytest.mark.parametrize("index", FEW)
def test_behind_fluid_it_is_brighter(organ: Organ, name: str, index: int) -> None:
    behind, beside = behind_and_beside(drawn(organ, name, index, size="medium", posterior="enhancement"))
    assert behind > beside + 8


@pytest.mark.parametrize(
    ("organ", "name"), [("breast", "spiculated_mass"), ("kidney", "stone"), ("vessel", "calcified_plaque")]
)
@pytest.mark.parametrize("index", FEW)
def test_behind_what_absorbs_it_is_darker(organ: Organ, name: str, index: int) -> None:
    values = {"size": "medium"} if organ == "breast" else {"wall": "far"} if organ == "vessel" else {}
    behind, beside = behind_and_beside(drawn(organ, name, index, posterior="shadowing", **values))
    assert behind < beside - 20


@pytest.mark.parametrize(("organ", "name"), [("breast", "circumscribed_mass"), ("liver", "hypoechoic_lesion")])
@pytest.mark.parametrize("index", FEW)
def test_behind_tissue_like_its_surroundings_nothing_changes(organ: Organ, name: str, index: int) -> None:
    behind, beside = behind_and_beside(drawn(organ, name, index, size="small", posterior="none"))
    assert abs(behind - beside) < 12


@pytest.mark.parametrize("organ", ["breast", "liver", "gynaecology"])
def test_sizes_are_shares_of_the_width(organ: Organ) -> None:
    name = "unilocular_cyst" if organ == "gynaecology" else "simple_cyst"
    for size, (low, high) in {"small": (0.12, 0.2), "medium": (0.24, 0.34), "large": (0.39, 0.52)}.items():
        _, columns = np.nonzero(lesion_of(drawn(organ, name, size=size)))
        assert low < (columns.max() - columns.min() + 1) / 224 < high


@pytest.mark.parametrize("organ", ["breast", "liver"])
def test_depth_is_where_the_lesion_lies(organ: Organ) -> None:
    for index in FEW:
        for size in ("small", "medium", "large"):
            superficial, deep = (
                np.nonzero(lesion_of(drawn(organ, "simple_cyst", index, size=size, depth=depth)))[0].mean() / 224
                for depth in ("superficial", "deep")
            )
            assert superficial < 0.42 < 0.5 < deep


@pytest.mark.parametrize(
    ("reduction", "low", "high"), [("below_50", 0.2, 0.5), ("50_to_69", 0.5, 0.7), ("70_or_more", 0.7, 0.95)]
)
def test_diameter_reduction_is_drawn_as_stated(reduction: str, low: float, high: float) -> None:
    names = {"below_50": "stenosis_below_50", "50_to_69": "stenosis_50_to_69", "70_or_more": "stenosis_70_or_more"}
    for index in FEW:
        found = drawn("vessel", names[reduction], index)
        lumen = (found.label_map == LABELS.index("fluid")).sum(axis=0)
        assert low < 1 - lumen.min() / lumen.max() < high


def test_a_body_marker_is_drawn_exactly_where_a_side_is_stated() -> None:
    for organ, region in REGIONS.items():
        if not region.has_side:
            continue
        sets = {found.side: found for found in attribute_sets(organ, "normal") if _same_but_side(found)}
        images = {side: phantom(1, 0, attributes=attributes).image for side, attributes in sets.items()}
        corners = {side: image[-38:-2, :46].tobytes() + image[-38:-2, -46:].tobytes() for side, image in images.items()}
        assert len(set(corners.values())) == 3, organ


def _same_but_side(attributes: Attributes) -> bool:
    return attributes.get("tissue") in (None, "fatty")


@pytest.mark.parametrize("organ", [organ for organ, region in REGIONS.items() if region.mirrors])
def test_a_mirrored_picture_takes_its_words_along(organ: Organ) -> None:
    for side, other in (("left", "right"), ("right", "left")):
        found = drawn(organ, "normal", side=side)
        mirrored = flip(found)
        assert (mirrored.image == found.image[:, ::-1]).all()
        assert (mirrored.label_map == found.label_map[:, ::-1]).all()
        assert mirrored.attributes.side == other
        assert render(mirrored.attributes, "en").lower() == render(found.attributes, "en").lower().replace(side, other)
        assert flip(mirrored).attributes == found.attributes
        # Its body marker is the one that is drawn of the other side.
        assert _marker(mirrored.image) == _marker(drawn(organ, "normal", side=other).image)


def _marker(image: npt.NDArray[np.uint8]) -> bytes:
    """The body marker, whichever corner it is in: there the picture has pixels of full white in a block."""
    corners = [image[-38:-2, 2:44], image[-38:-2, -44:-2]]
    return max(corners, key=lambda corner: int((corner == 255).sum())).tobytes()


@pytest.mark.parametrize("organ", ["heart", "liver"])
def test_what_has_an_orientation_by_convention_is_not_mirrored(organ: Organ) -> None:
    with pytest.raises(NotMirroredError, match=f"a picture of {organ} cannot be mirrored"):
        flip(drawn(organ, "normal"))


def test_patches_take_the_label_of_their_lesion_or_of_most_pixels() -> None:
    fluid, liver, lesion = (LABELS.index(name) for name in ("fluid", "liver", "lesion_solid"))
    labels = np.full((56, 56), liver, dtype=np.uint8)
    labels[:28, :20] = fluid
    labels[28:36, 28:56] = lesion
    labels[28:30, :28] = lesion
    assert patch_labels(labels).tolist() == [[fluid, liver], [liver, lesion]]


def test_a_loop_begins_with_the_still_picture_and_moves() -> None:
    for organ, name in select_classes(classes=["heart/normal", "kidney/stone"]):
        found = phantom(4, 1, classes=[(organ, name)])
        frames = cine_frames(found.attributes, 4, 1, 8)
        assert (frames[0] == found.image).all()
        assert len({frame.tobytes() for frame in frames}) >= 5
        assert [frame.tobytes() for frame in cine_frames(found.attributes, 4, 1, 8)] == [
            frame.tobytes() for frame in frames
        ]


def test_attributes_decide_the_picture_and_not_the_other_way() -> None:
    found = drawn("liver", "cirrhosis", ascites="present")
    changed = replace(
        found.attributes,
        pairs=tuple((name, "absent" if name == "ascites" else value) for name, value in found.attributes.pairs),
    )
    assert phantom(5, 0, attributes=changed).image.tobytes() != found.image.tobytes()
