"""The digest of a request's prompt, with which a replay is compared before it is computed."""

import hashlib
from collections.abc import Iterable

import numpy as np

from echovlm_ray.errors import PromptChangedError


def prompt_digest(input_ids: Iterable[int]) -> str:
    """SHA-256 over token ids, each as 4 bytes, little-endian."""
    return hashlib.sha256(np.fromiter(input_ids, dtype="<u4").tobytes()).hexdigest()


def check_prompt(input_ids: Iterable[int], expected: str) -> None:
    """Compares a prompt with the digest of an earlier one; "" is not compared.

    Raises:
        PromptChangedError: they differ.
    """
    if expected and prompt_digest(input_ids) != expected:
        raise PromptChangedError
