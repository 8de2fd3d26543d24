"""Holds that the committed code of the contracts is what their compiler makes of them."""

from pathlib import Path

from protos.generate import ROOT, generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate(tmp_path)
    made = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    assert made
    committed = {name: (ROOT / "protos" / name).read_text() for name in made}
    stale = [name for name, text in made.items() if committed[name] != text]
    assert not stale, f"run `make protos`: {', '.join(stale)} differ from their contracts"
