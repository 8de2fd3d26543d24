"""Validates operators' arguments that need no look-up in the database."""

import math
import re

from router.errors import InvalidRolloutRequestError
from router.rollouts.formatting import format_number
from router.rollouts.rollout_file import DIGEST

MAX_ACTOR = 200


def check_actor(actor: str) -> str:
    """Returns the operator's name if the history can store it.

    Raises:
        InvalidRolloutRequestError: empty, too long, or not printable.
    """
    if not actor.strip() or len(actor) > MAX_ACTOR or not actor.isprintable():
        raise InvalidRolloutRequestError(
            "actor", f"must name the operator, in 1 to {MAX_ACTOR} printable characters; it is recorded in the history"
        )
    return actor


def check_organ(organ: str) -> str:
    """Returns a valid name of an organ, which may be new.

    Raises:
        InvalidRolloutRequestError: it is not a valid name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", organ):
        raise InvalidRolloutRequestError(
            "organ", f"{organ[:64]!r} must be lower-case letters, digits and hyphens, like 'breast'"
        )
    return organ


def check_digest(digest: str) -> str:
    """Returns a valid digest of a bundle.

    Raises:
        InvalidRolloutRequestError: it is not the 64 hexadecimal digits of a SHA-256.
    """
    if not DIGEST.fullmatch(digest):
        raise InvalidRolloutRequestError("digest", f"{digest[:80]!r} must be 64 lower-case hexadecimal digits")
    return digest


def check_percent(percent: float) -> float:
    """Returns a valid percentage of requests.

    Raises:
        InvalidRolloutRequestError: not above 0, or above 100.
    """
    if not math.isfinite(percent) or not 0 < percent <= 100:
        raise InvalidRolloutRequestError(
            "percent",
            f"{format_number(percent)} must be above 0 and at most 100; to take a candidate's traffic away, roll it "
            "back",
        )
    return float(percent)
