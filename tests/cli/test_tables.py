import re

import pytest
from rich.progress_bar import ProgressBar

from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import console_of, styled

WORDS = (
    "gynaecology",
    "10.20.30.40:50052",
    "2026-11-30",
    "12:00:00",
    "s3://models-of-the-hospital/experts",
    "1.10.0-rc.1",
)
REASON = "3 of 3 requests failed because the replica at 10.20.30.40:50052 computed what is no number"


def drawn(listing: Listing, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    console_of().print(listing)
    return capsys.readouterr().out


def table() -> Listing:
    listing = Listing("organ", "endpoint", "time", "registry", "version", "reason")
    listing.add_row(WORDS[0], WORDS[1], f"{WORDS[2]} {WORDS[3]}", WORDS[4], styled(WORDS[5], "red"), REASON)
    listing.add_row("", "", "", "", "", "")
    return listing


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_word_is_broken(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = drawn(table(), width, monkeypatch, capsys)
    assert set(WORDS) | set(REASON.split()) <= set(printed.split())
    assert all(len(row) <= width for row in printed.splitlines())


def test_what_fits_is_a_table_and_what_does_not_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = drawn(table(), 220, monkeypatch, capsys)
    assert wide.splitlines()[0].split() == ["organ", "endpoint", "time", "registry", "version", "reason"]
    narrow = drawn(table(), 60, monkeypatch, capsys)
    assert [row.rstrip() for row in narrow.splitlines()[:3]] == [
        "organ gynaecology",
        "  endpoint: 10.20.30.40:50052  time: 2026-11-30 12:00:00",
        "  registry: s3://models-of-the-hospital/experts",
    ]


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_quantity_stays_with_its_unit(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = Listing("replica", "memory", "state", "note")
    listing.add_row("n83crpm5", "4.76 MB of 17.2 GB", styled("canary 12.5 %", "red"), "watched for 600 s, since 3 min")
    printed = drawn(listing, width, monkeypatch, capsys)
    for quantity in ("4.76 MB", "17.2 GB", "12.5 %", "600 s,", "3 min"):
        assert quantity in printed
    assert all(len(row) <= width for row in printed.splitlines())


def test_a_word_longer_than_the_terminal_is_whole_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = Listing("a rather long name for a column", "value")
    listing.add_row("row", "d" * 78)
    assert "d" * 78 in drawn(listing, 80, monkeypatch, capsys)


def test_chinese_breaks_between_its_signs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listing = Listing("organ", "reason")
    listing.add_row("breast", "左乳外上象限可见低回声结节" * 6)
    printed = drawn(listing, 40, monkeypatch, capsys)
    assert printed.splitlines()[0].split() == ["organ", "reason"]
    assert re.sub(r"[\sa-z]", "", printed) == "左乳外上象限可见低回声结节" * 6


def test_cells_are_no_markup_and_no_longer_than_people_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = Listing("[bold]name[/bold]", "")
    listing.add_row("[red]\x1b[2J[/red]", ProgressBar(total=1.0, completed=0.5, width=20))
    listing.add_row("word " * 600)
    printed = drawn(listing, 80, monkeypatch, capsys)
    assert "[bold]name[/bold]" in printed
    assert r"[red]\x1b[2J[/red]" in printed
    assert "…" in printed
    assert printed.count("word") < 130
