import ast
import json
from pathlib import Path

import pytest

from echovlm_ray.cli.terminal import MAX_NAME, console_of, line, name_of, say, say_json, styled
from experts.bundles.invisible import visible

CLI = Path(__file__).resolve().parents[2] / "echovlm_ray" / "cli"
HOSTILE = "a\x1b[31m\x1b]0;owned\x07\x9b2J\u202eb\u200b\u2028[red]c[/red]:smile:\r\x00\x7f\U000e0041\ud800"


def is_harmless(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


def test_what_steers_a_terminal_is_shown_as_its_escape() -> None:
    assert visible("a\x1b[31mb\r\n\tc\u202e心\u3000\xa0") == "a\\x1b[31mb\n\tc\\u202e心\u3000\xa0"
    assert is_harmless(visible(HOSTILE))
    assert line("two\nlines\r and\x1b") == "two lines and\\x1b"


def test_a_long_name_is_cut() -> None:
    assert name_of("x" * 3000) == "x" * (MAX_NAME - 1) + "…"
    assert name_of("x" * MAX_NAME) == "x" * MAX_NAME
    assert name_of("\x1b" * 3000) == (r"\x1b" * 15)[: MAX_NAME - 1] + "…"


def test_strings_on_a_console_are_taken_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = console_of()
    console.print(HOSTILE, styled(HOSTILE, "red"), soft_wrap=True)
    say(HOSTILE)
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert printed.count("[red]c[/red]:smile:") == 3


def test_json_reads_back_as_it_was_and_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "心", 1.5, None]}
    say_json(value, indent=2)
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert json.loads(printed) == value
    assert "心" in printed


def test_commands_print_through_the_terminal_alone() -> None:
    wrong = []
    for path in sorted(CLI.glob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "Console", "Table"):
                wrong.append(f"{path.name}:{node.lineno} {ast.unparse(node.func)}")
    allowed = {"tables.py"}
    assert not [place for place in wrong if place.partition(":")[0] not in allowed], wrong
