import os
from pathlib import Path

import pytest

from echovlm_ray.serving.cluster.ray_auth import check_ray_auth


@pytest.mark.parametrize("mode", ["disabled", "", "Token", "k8s", "none", " token"])
def test_any_mode_but_token_is_refused_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ValueError, match="--insecure-ray"):
        check_ray_auth(insecure=False)
    check_ray_auth(insecure=True)
    assert os.environ["RAY_AUTH_MODE"] == mode


@pytest.mark.parametrize("mode", ["token", None])
def test_token_is_the_mode_otherwise(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    check_ray_auth(insecure=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_empty_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", " ")
    with pytest.raises(ValueError, match="RAY_AUTH_TOKEN is empty"):
        check_ray_auth(insecure=False)


@pytest.mark.parametrize(
    ("mode", "content", "problem"),
    [
        (0o644, "x" * 64, "chmod 600"),
        (0o620, "x" * 64, "chmod 600"),
        (0o600, "\n", "is empty"),
        (None, "", "cannot be read"),
    ],
)
def test_a_file_of_the_token_that_gives_no_protection_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int | None, content: str, problem: str
) -> None:
    path = tmp_path / "token"
    if mode is not None:
        path.write_text(content)
        path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ValueError, match=f"RAY_AUTH_TOKEN_PATH.*{problem}"):
        check_ray_auth(insecure=False)
    path.write_text("x" * 64)
    path.chmod(0o600)
    check_ray_auth(insecure=False)
