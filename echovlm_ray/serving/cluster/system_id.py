"""The identity of a system: its name on the cluster, and a random id.

The parts know each other by plain names, `gateway` or `expert-heart`. On a Ray cluster the applications of a system
that has a name are called `team-a.gateway` and `team-a.expert-heart`, so that several systems can run side by side.
"""

import re
from dataclasses import dataclass

# No part's name has one: organs are letters, digits and hyphens.
SEPARATOR = "."


@dataclass(frozen=True, slots=True)
class SystemId:
    """One system.

    Attributes:
        name: on its cluster; "" is the default one.
        identity: of the deployment, made with its database; "" where it is not known.
    """

    name: str = ""
    identity: str = ""

    def application(self, part: str) -> str:
        """The Ray Serve application of a part."""
        return f"{self.name}{SEPARATOR}{part}" if self.name else part

    def part(self, application: str) -> str | None:
        """The part that an application is; None if it is not this system's."""
        name, separator, part = application.rpartition(SEPARATOR)
        return part if name == self.name and bool(separator) == bool(self.name) else None

    def __str__(self) -> str:
        """What messages call it."""
        return f"the system {self.name!r}" if self.name else "the system without a name"


DEFAULT_SYSTEM = SystemId()


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: it cannot be a part of an application's name.
    """
    if name and not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name):
        raise ValueError(f"the system's name {name[:100]!r} must be lower-case letters, digits and hyphens: team-a")
    return name
