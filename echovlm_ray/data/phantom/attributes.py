"""The attributes of one picture, or those that a text states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echovlm_ray.data.phantom.schema import NORMAL, SIDE, Organ


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a picture or a text; the two are compared with `==`.

    Attributes:
        organ: None if a text does not state it.
        class_name: the diagnosis; None if a text states none or several.
        pairs: attribute and value, in the order of the region's schema. What is not said is not there. Use
            `attributes_of` to make them from a mapping.
        contradictions: what a text states in two ways, or against its own diagnosis: names of attributes, or "organ",
            "diagnosis", "category". Empty for a picture.
    """

    organ: Organ | None
    class_name: str | None
    pairs: tuple[tuple[str, str], ...]
    contradictions: tuple[str, ...] = ()

    @property
    def values(self) -> Mapping[str, str]:
        """Attribute → value."""
        return dict(self.pairs)

    def get(self, name: str) -> str | None:
        """The value of an attribute; None where it is not stated."""
        return self.values.get(name)

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def as_json(self) -> dict[str, Any]:
        """As records have it; `from_json` reads it."""
        return {"organ": self.organ, "class": self.class_name, "values": dict(self.pairs)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Attributes":
        """The inverse of `as_json`.

        Raises:
            ValueError: a field is missing.
        """
        missing = {"organ", "class", "values"} - set(content)
        if missing:
            raise ValueError(f"attributes lack {', '.join(sorted(missing))}: take them from `as_json`")
        return cls(content["organ"], content["class"], tuple(content["values"].items()))

    @property
    def side(self) -> str | None:
        """Left or right, where a body marker shows it."""
        return self.get(SIDE)

    @property
    def is_normal(self) -> bool:
        """Whether the diagnosis is "normal", stated in so many words; saying nothing is not that."""
        return self.class_name == NORMAL
