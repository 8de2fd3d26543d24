import pytest

from experts.transport.secret import NO_SECRET, SECRET_KEY, SystemSecret

SECRET = SystemSecret("s" * 64)


@pytest.mark.parametrize(
    ("sent", "right"),
    [
        ([], False),
        ([("authorization", SECRET.text)], False),
        ([(SECRET_KEY, "")], False),
        ([(SECRET_KEY, "s" * 63)], False),
        ([(SECRET_KEY, "s" * 63 + "t")], False),
        ([(SECRET_KEY, "ü" * 64)], False),
        ([("x-request-id", "1"), (SECRET_KEY, SECRET.text)], True),
        ([(SECRET_KEY, SECRET.text.encode())], True),
    ],
)
def test_only_the_secret_itself_matches(sent: list[tuple[str, str | bytes]], right: bool) -> None:
    assert SECRET.matches(sent) is right


def test_no_secret_matches_nothing() -> None:
    assert not NO_SECRET.matches([(SECRET_KEY, "")])
    assert NO_SECRET.metadata == ()


def test_every_system_has_another_one_and_no_text_shows_it() -> None:
    first, second = SystemSecret.random(), SystemSecret.random()
    assert first != second
    assert len(first.text) == 64
    assert first.text not in f"{first!r} {first}"
