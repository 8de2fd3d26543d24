"""The secret of a running system, which authenticates its parts to each other.

Loopback and a cluster's network are open to other users and programs. So every call between the parts has the secret in
its metadata, and every internal server checks it first.
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
    """One system's secret. Its text is not in `repr`, so that no log or error shows it.

    Attributes:
        text: printable ASCII; "" never matches.
    """

    text: str = field(repr=False)

    @classmethod
    def random(cls) -> Self:
        """A new one, of 256 bits."""
        return cls(secrets.token_hex(_BYTES))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a call."""
        return ((SECRET_KEY, self.text),) if self.text else ()

    def matches(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a call's metadata has this secret. Compares in constant time."""
        for key, value in metadata:
            if key == SECRET_KEY:
                sent = value.encode(errors="replace") if isinstance(value, str) else value
                return bool(self.text) and hmac.compare_digest(sent, self.text.encode())
        return False


NO_SECRET = SystemSecret("")
