"""The schema of a picture's description: regions, their attributes with the words for each value, and their classes.

The words follow the lexicons of each region: BI-RADS US, ACR TI-RADS, O-RADS, US LI-RADS, SFU, ASE/ESC and SRU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Organ = Literal["breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel"]
ORGANS: tuple[Organ, ...] = get_args(Organ)
Probe = Literal["linear", "convex", "sector"]

SIDE = "side"
NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Words:
    """Wordings of one term, most usual first; a report's style chooses one.

    Attributes:
        en: English, lower case.
        zh: Chinese.
        also_en: wordings that the parser accepts, but reports do not use.
        also_zh: likewise.
    """

    en: tuple[str, ...]
    zh: tuple[str, ...]
    also_en: tuple[str, ...] = ()
    also_zh: tuple[str, ...] = ()

    def written(self, language: str) -> tuple[str, ...]:
        """The wordings that reports use, in "en" or "zh"."""
        return self.en if language == "en" else self.zh

    def read(self, language: str) -> tuple[str, ...]:
        """All wordings that the parser accepts."""
        return self.en + self.also_en if language == "en" else self.zh + self.also_zh


def words(en: str, zh: str, also_en: str = "", also_zh: str = "") -> Words:
    """Words from texts with `|` between the wordings."""
    return Words(*(tuple(part for part in text.split("|") if part) for text in (en, zh, also_en, also_zh)))


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute, such as "margin", and its values.

    Attributes:
        name: unique within a region.
        question: such as "What is the margin of the mass?".
        values: name of a value → its words. The words of two values of a region are never the same.
    """

    name: str
    question: Words
    values: Mapping[str, Words]


@dataclass(frozen=True, slots=True)
class PhantomClass:
    """One diagnosis of a region.

    Attributes:
        name: as in file names and options, like "simple_cyst".
        diagnosis: its words in an impression.
        choices: attribute → the values it may have in a picture of this class, in the schema's order. An attribute
            that is not among them is never stated of this class.
    """

    name: str
    diagnosis: Words
    choices: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Sentence:
    """One sentence of the findings: a lead, and the attributes that follow it.

    Attributes:
        lead: an attribute whose value begins the sentence; or None, then the region's own name does.
        attributes: in the order of the sentence.
    """

    lead: str | None
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """One of the seven regions.

    Attributes:
        organ: its name in expert bundles.
        subject: its words; `{side}` is replaced by the body marker's side.
        probe: its transducer.
        mirrors: whether a mirrored picture is a valid one. Where the anatomy has an orientation by convention, it is
            not.
        attributes: all that can be stated, in order.
        classes: "normal" is the first.
        sentences: of the findings.
    """

    organ: Organ
    subject: Words
    probe: Probe
    mirrors: bool
    attributes: tuple[Attribute, ...]
    classes: tuple[PhantomClass, ...]
    sentences: tuple[Sentence, ...]

    @cached_property
    def attribute(self) -> Mapping[str, Attribute]:
        """The attributes by name."""
        return {attribute.name: attribute for attribute in self.attributes}

    @cached_property
    def class_named(self) -> Mapping[str, PhantomClass]:
        """The classes by name."""
        return {phantom_class.name: phantom_class for phantom_class in self.classes}

    @property
    def has_side(self) -> bool:
        """Whether a body marker can show a side."""
        return SIDE in self.attribute


def choices(text: str) -> dict[str, tuple[str, ...]]:
    """Choices from a text like "size=small|large shape=oval"."""
    pairs = (part.partition("=") for part in text.split())
    return {name: tuple(values.split("|")) for name, _, values in pairs}


SIDE_ATTRIBUTE = Attribute(
    SIDE,
    words("Which side of the body is shown?", "图像显示的是身体哪一侧？"),
    {"left": words("left", "左侧"), "right": words("right", "右侧")},
)


def size_attribute(names: str = "small|medium|large") -> Attribute:
    """The size of a lesion, as a share of the picture's width: without a scale there are no millimetres."""
    sizes = {
        "small": words("small", "体积小"),
        "medium": words("medium-sized", "体积中等"),
        "large": words("large", "体积大"),
    }
    return Attribute(
        "size",
        words("How large is the lesion in the image?", "病灶在图像中有多大？"),
        {name: sizes[name] for name in names.split("|")},
    )


def depth_attribute() -> Attribute:
    """The depth of a lesion's centre between the top and the bottom of the picture."""
    return Attribute(
        "depth",
        words("At which depth does the lesion lie?", "病灶位于图像的什么深度？"),
        {"superficial": words("superficial", "位置浅"), "deep": words("deep", "位置深")},
    )


def posterior_attribute(names: str = "none|enhancement|shadowing") -> Attribute:
    """What the tissue behind a lesion looks like."""
    kinds = {
        "none": words("no posterior features", "后方回声无改变", also_en="no posterior acoustic features"),
        "enhancement": words(
            "posterior enhancement|posterior acoustic enhancement",
            "后方回声增强",
            also_en="acoustic enhancement",
            also_zh="后方增强|后方伴回声增强|后方伴强回声增强",
        ),
        "shadowing": words(
            "posterior shadowing|posterior acoustic shadow",
            "后方伴声影|后方声影",
            also_en="acoustic shadowing|acoustic shadow|posterior shadow|shadowing",
            also_zh="声影|后方回声衰减",
        ),
    }
    return Attribute(
        "posterior",
        words("What is seen behind the lesion?", "病灶后方回声如何？"),
        {name: kinds[name] for name in names.split("|")},
    )
