"""The secret of a running system: who carries it is one of its own parts.

Loopback and a cluster's network are open to other users and programs. Every call between the parts therefore carries
the secret in its metadata, and every server between the parts compares it before it does anything else.
"""

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

SECRET_KEY = "echovlm-system-secret"
_BYTES = 32


@dataclass(frozen=True, slots=True)
class SystemSecret:
    """One system's secret. Its text stays out of `repr`, so that no log or error shows it.

    Attributes:
        text: printable ASCII; "" is no secret, which nothing matches.
    """

    text: str = field(repr=False)

    @classmethod
    def random(cls) -> Self:
        """A new one, of 256 bits."""
        return cls(secrets.token_hex(_BYTES))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        return ((SECRET_KEY, self.text),) if self.text else ()

    def matches(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a call's metadata carry this secret; takes as long for a nearly right one as for any other."""
        for key, value in metadata:
            if key == SECRET_KEY:
                sent = value.encode(errors="replace") if isinstance(value, str) else value
                return bool(self.text) and hmac.compare_digest(sent, self.text.encode())
        return False


NO_SECRET = SystemSecret("")
