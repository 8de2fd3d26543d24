"""Categories of the lexicons that follow from the attributes."""

import pytest

from echovlm_ray.data.phantom.catalogue import attribute_sets
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.data.phantom.scores import category, tirads_level, tirads_points


# Sums of the points of ACR TI-RADS: solid 2, isoechoic 1, very hypoechoic 3, taller 3, irregular 2, punctate foci 3.
@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("colloid_cyst", {0}),
        ("spongiform_nodule", {0}),
        ("isoechoic_nodule", {3}),
        ("suspicious_nodule", {11, 13}),
    ],
)
def test_tirads_points_are_summed(name: str, sums: set[int]) -> None:
    assert {tirads_points(attributes) for attributes in attribute_sets("thyroid", name)} == sums


def test_no_nodule_has_no_points() -> None:
    assert tirads_points(next(attribute_sets("thyroid", "normal"))) is None
    assert tirads_points(next(attribute_sets("breast", "normal"))) is None


@pytest.mark.parametrize(
    ("points", "level"), [(0, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 4), (7, 5), (11, 5), (13, 5)]
)
def test_tirads_levels(points: int, level: int) -> None:
    assert tirads_level(points) == level


@pytest.mark.parametrize(
    ("organ", "name", "text"),
    [
        ("breast", "normal", "BI-RADS 1"),
        ("breast", "simple_cyst", "BI-RADS 2"),
        ("breast", "circumscribed_mass", "BI-RADS 3"),
        ("breast", "complex_mass", "BI-RADS 4"),
        ("breast", "spiculated_mass", "BI-RADS 5"),
        ("thyroid", "colloid_cyst", "TI-RADS 0 points, TR1"),
        ("thyroid", "isoechoic_nodule", "TI-RADS 3 points, TR3"),
        ("gynaecology", "unilocular_cyst", "O-RADS 1 to 3"),
        ("gynaecology", "multilocular_cyst", "O-RADS 3 to 4"),
        ("gynaecology", "cyst_with_solid_part", "O-RADS 4 to 5"),
        ("gynaecology", "endometrioma", "O-RADS 2 to 3"),
        ("liver", "simple_cyst", "LI-RADS US-1"),
        ("liver", "hypoechoic_lesion", "LI-RADS US-2 to US-3"),
        ("kidney", "mild_hydronephrosis", "SFU grade 2"),
        ("kidney", "marked_hydronephrosis", "SFU grade 4"),
        ("kidney", "stone", "SFU grade 0"),
    ],
)
def test_categories(organ: Organ, name: str, text: str) -> None:
    found = category(next(attribute_sets(organ, name)))
    assert found is not None
    assert found.en == text


@pytest.mark.parametrize(
    ("organ", "name"), [("heart", "hypertrophy"), ("vessel", "thrombus"), ("gynaecology", "leiomyoma")]
)
def test_where_a_lexicon_has_no_category_none_is_given(organ: Organ, name: str) -> None:
    assert category(next(attribute_sets(organ, name))) is None
