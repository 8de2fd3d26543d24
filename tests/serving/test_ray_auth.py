import os

import pytest

from echovlm_ray.serving.ray_auth import check_ray_auth


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
