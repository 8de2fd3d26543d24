"""Digests: the identities of files, bundles and expert sets."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no blanks, UTF-8, no NaN.

    Raises:
        ValueError: the value contains NaN or infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical form of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
