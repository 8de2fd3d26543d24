"""Checks that Ray's own ports require a token: some of them unpickle what they receive."""

import os
from pathlib import Path

from echovlm_ray.serving.grpc.private_file import read_private

MODE = "RAY_AUTH_MODE"
_TOKEN = "token"


def check_ray_auth(*, insecure: bool) -> None:
    """Has Ray ask for its token, or refuses to start where the environment says that it should not.

    Args:
        insecure: start all the same (`--insecure-ray`).

    Raises:
        ValueError: `RAY_AUTH_MODE` is set to anything but token, or the token is empty, or others can read its file.
    """
    mode = os.environ.get(MODE)
    if insecure:
        return
    if mode is not None and mode != _TOKEN:
        raise ValueError(
            f"{MODE} is {mode!r}: without Ray's token, every user who reaches Ray's ports can run code as you. Unset "
            "it, or start with --insecure-ray where no one else can reach this machine or its network"
        )
    if os.environ.get("RAY_AUTH_TOKEN", _TOKEN).strip() == "":
        raise ValueError("RAY_AUTH_TOKEN is empty: unset it, and a random token is made")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not read_private(Path(path), "RAY_AUTH_TOKEN_PATH").strip():
        raise ValueError(f"RAY_AUTH_TOKEN_PATH {path} is empty: unset it, and a random token is made")
    os.environ[MODE] = _TOKEN
