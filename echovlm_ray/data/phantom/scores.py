"""The category that follows from the attributes: BI-RADS, ACR TI-RADS, O-RADS, US LI-RADS, SFU.

A category that depends on millimetres or on flow, which a phantom does not show, is given as the range that remains.
Diameter reduction (SRU) and the signs of the heart (ASE, ESC) are attributes themselves.
"""

from dataclasses import dataclass

from echovlm_ray.data.phantom.attributes import Attributes

# ACR TI-RADS, Tessler 2017: points for each feature.
TIRADS_POINTS = {
    "composition": {"cystic": 0, "spongiform": 0, "solid": 2},
    "echogenicity": {"anechoic": 0, "isoechoic": 1, "very_hypoechoic": 3},
    "shape": {"wider": 0, "taller": 3},
    "margin": {"smooth": 0, "irregular": 2},
    "foci": {"none": 0, "comet_tail": 0, "punctate": 3},
}
_BIRADS = {"normal": 1, "simple_cyst": 2, "circumscribed_mass": 3, "complex_mass": 4, "spiculated_mass": 5}
# Lowest and highest category; the size in centimetres and the colour score decide between them.
_ORADS = {
    "normal": (1, 1),
    "unilocular_cyst": (1, 3),
    "multilocular_cyst": (3, 4),
    "cyst_with_solid_part": (4, 5),
    "endometrioma": (2, 3),
}
# Below 10 mm an observation is US-2, from 10 mm on US-3. Only what is surely benign stays US-1.
_LIRADS_OBSERVATIONS = ("haemangioma", "hypoechoic_lesion")
# Society for Fetal Urology: 2 is a dilated pelvis with some calyces, 4 dilated calyces under thin parenchyma.
_SFU = {"mild": 2, "marked": 4, "not_dilated": 0}


@dataclass(frozen=True, slots=True)
class Category:
    """A category of a lexicon, in its words."""

    en: str
    zh: str

    def text(self, language: str) -> str:
        """In "en" or "zh"."""
        return self.en if language == "en" else self.zh


def tirads_points(attributes: Attributes) -> int | None:
    """The points of a thyroid nodule in ACR TI-RADS; None where there is no nodule.

    Raises:
        KeyError: it is not stated whether there is one, or what it looks like.
    """
    if attributes.organ != "thyroid" or attributes["lesion"] != "nodule":
        return None
    if attributes["composition"] == "spongiform":
        # Further features of a spongiform nodule earn no points.
        return 0
    return sum(points[attributes[name]] for name, points in TIRADS_POINTS.items())


def tirads_level(points: int) -> int:
    """TR1 to TR5 of a sum of points: 0 (and 1), 2, 3, 4 to 6, 7 and more."""
    return 1 + sum(points >= least for least in (2, 3, 4, 7))


def category(attributes: Attributes) -> Category | None:
    """The category of a picture with complete attributes; None where its lexicon has none for it."""
    name = attributes.class_name or ""
    if attributes.organ == "breast":
        return Category(f"BI-RADS {_BIRADS[name]}", f"BI-RADS {_BIRADS[name]}类")
    if attributes.organ == "thyroid":
        points = tirads_points(attributes)
        if points is None:
            return None
        level = tirads_level(points)
        return Category(f"TI-RADS {points} points, TR{level}", f"TI-RADS {points}分，TR{level}")
    if attributes.organ == "gynaecology" and name in _ORADS:
        low, high = _ORADS[name]
        if low == high:
            return Category(f"O-RADS {low}", f"O-RADS {low}类")
        return Category(f"O-RADS {low} to {high}", f"O-RADS {low}至{high}类")
    if attributes.organ == "liver":
        text = "US-2 to US-3" if name in _LIRADS_OBSERVATIONS else "US-1"
        return Category(f"LI-RADS {text}", f"LI-RADS {text.replace(' to ', '至')}")
    if attributes.organ == "kidney":
        grade = _SFU[attributes["collecting"]]
        return Category(f"SFU grade {grade}", f"SFU {grade}级")
    return None
