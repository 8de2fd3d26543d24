"""The id of a call in every log: from the caller or generated, and returned in both directions."""

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

REQUEST_ID_KEY = "x-request-id"
# What callers send is logged, so it must be an id and nothing else.
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the call that is being served, or "" outside of one."""
    return _current.get()


def request_id_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The caller's id if it sent a usable one (at most 128 of A-Z a-z 0-9 . _ : / -), otherwise a new one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and _ACCEPTED.fullmatch(value):
            return value
    return uuid.uuid4().hex


def set_request_id(request_id: str) -> None:
    """Names the call that the current task serves."""
    _current.set(request_id)
