"""The file of tokens, changed in every way while calls run."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from echovlm_ray.errors import UnauthenticatedError
from echovlm_ray.serving.grpc import auth, private_file
from echovlm_ray.serving.grpc.auth import BearerTokens


def header(token: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {token}")]


def passes(tokens: BearerTokens, token: str) -> bool:
    try:
        tokens.check(header(token))
    except UnauthenticatedError:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text("first\nsecond\n")
    return path


def test_contents_of_the_same_size_and_time_are_seen(path: Path) -> None:
    tokens = BearerTokens(path)
    before = path.stat()
    path.write_text("fresh\nsecond\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert passes(tokens, "fresh")
    assert not passes(tokens, "first")


def test_a_file_that_does_not_change_is_not_read_with_each_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "SETTLED_S", -1.0)
    tokens = BearerTokens(path)
    assert passes(tokens, "first")
    monkeypatch.setattr(os, "read", lambda *_: pytest.fail("was read"))
    assert passes(tokens, "second")
    assert not passes(tokens, "third")


def test_a_change_within_one_step_of_the_file_systems_clock_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_at_ns = path.stat().st_ctime_ns
    state = auth._state
    monkeypatch.setattr(auth, "_state", lambda path: state(path)._replace(changed_at_ns=changed_at_ns))  # type: ignore[union-attr]
    tokens = BearerTokens(path)
    assert passes(tokens, "first")
    path.write_text("fresh\nsecond\n")
    assert passes(tokens, "fresh")
    assert not passes(tokens, "first")


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"first\n\xff\xfe\n"),
        lambda path: path.write_text(""),
        lambda path: path.write_text("# first\n"),
        lambda path: path.chmod(0o644),
        lambda path: path.chmod(0o640),
        lambda path: (path.unlink(), path.mkdir()),
        _make_pipe,
    ],
)
def test_while_the_file_cannot_be_used_no_token_is_good(path: Path, spoil: Callable[[Path], object]) -> None:
    tokens = BearerTokens(path)
    assert passes(tokens, "first")
    spoil(path)
    assert not passes(tokens, "first")
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.touch()
    path.chmod(0o600)
    path.write_text("first\n")
    assert passes(tokens, "first")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o444, 0o620, 0o602])
def test_a_file_that_others_can_read_or_write_is_refused_with_what_to_type(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"can be read or written by other users: chmod 600 {path}"):
        BearerTokens(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused_with_what_to_type(path: Path) -> None:
    tokens = BearerTokens(path)
    os.chown(path, 12345, -1)
    with pytest.raises(ValueError, match=f"belongs to another user: chown 0 {path}"):
        BearerTokens(path)
    assert not passes(tokens, "first")


def test_a_file_longer_than_one_read_is_taken_whole(path: Path) -> None:
    path.write_text("".join(f"token-{number}\n" for number in range(20_000)))
    tokens = BearerTokens(path)
    assert passes(tokens, "token-0")
    assert passes(tokens, "token-19999")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_its_user_alone_is_taken(path: Path, mode: int) -> None:
    path.chmod(mode)
    assert passes(BearerTokens(path), "second")


def test_a_file_that_is_no_text_is_refused_at_start(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        BearerTokens(path)


async def test_a_call_ends_with_its_token_and_others_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "REVOKED_AFTER_S", 0.05)
    monkeypatch.setattr(auth, "REWRITTEN_WITHIN_S", 0.05)
    tokens = BearerTokens(path)
    first, second = (tokens.check(header(token)).digest for token in ("first", "second"))
    ends: dict[bytes, list[Exception]] = {first: [], second: []}
    with tokens.watched(first, ends[first].append), tokens.watched(second, ends[second].append):
        await asyncio.sleep(0.2)
        assert ends == {first: [], second: []}
        path.write_text("second\n")
        await asyncio.sleep(0.2)
    assert str(ends[first][0]) == auth.REVOKED
    assert ends[second] == []


async def test_a_file_that_is_written_in_place_refuses_and_ends_no_call(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REVOKED_AFTER_S", 0.04)
    monkeypatch.setattr(auth, "REWRITTEN_WITHIN_S", 10.0)
    tokens = BearerTokens(path)
    second = tokens.check(header("second"))
    ends: list[Exception] = []
    with tokens.watched(second.digest, ends.append):
        for written in ("", "fi", "first\n", "first\nsec"):
            path.write_text(written)
            await asyncio.sleep(0.05)
            assert not passes(tokens, "second")
            waiting = asyncio.create_task(tokens.admit(header("second")))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            # Those that never were good do not wait.
            with pytest.raises(UnauthenticatedError):
                await asyncio.wait_for(tokens.admit(header("third")), 5)
            path.write_text("first\nsecond\n")
            assert await waiting == second
    assert not ends


async def test_a_revoked_token_is_refused_when_the_file_has_not_changed_for_a_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REWRITTEN_WITHIN_S", 0.1)
    tokens = BearerTokens(path)
    path.write_text("second\n")
    with pytest.raises(UnauthenticatedError, match="not one that this server knows"):
        await asyncio.wait_for(tokens.admit(header("first")), 10)
    assert (await tokens.admit(header("second"))).digest


def test_a_file_that_is_too_large_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = BearerTokens(path)
    os.truncate(path, private_file.MAX_BYTES + 1)
    monkeypatch.setattr(os, "read", lambda *_: pytest.fail("was read"))
    with pytest.raises(ValueError, match=f"has {private_file.MAX_BYTES + 1} bytes; at most"):
        BearerTokens(path)
    assert not passes(tokens, "first")


def test_each_thing_that_is_wrong_with_the_file_is_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = BearerTokens(path)
    path.write_text("")
    assert not passes(tokens, "first")
    assert not passes(tokens, "first")
    path.chmod(0o644)
    assert not passes(tokens, "first")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "holds no token" in said[0]
    assert "chmod 600" in said[1]


def test_a_token_may_have_a_name(path: Path) -> None:
    path.write_text("first\nsecond  ward 7\n\tthird\tward 7 \n")
    tokens = BearerTokens(path)
    assert [tokens.check(header(token)).name for token in ("first", "second", "third")] == ["", "ward 7", "ward 7"]
    assert tokens.names == {"ward 7"}
    assert not passes(tokens, "second  ward 7")
