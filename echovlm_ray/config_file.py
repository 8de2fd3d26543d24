"""Reads a configuration file: YAML in, `Config` out, and errors that name the file, the line and the fix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echovlm_ray.config import Config
from echovlm_ray.document_validation import validated
from echovlm_ray.yaml_document import Document, DocumentError, read_document


class ConfigError(DocumentError):
    """A configuration cannot be used; the text has a line for each problem."""


def load_config(path: Path | None, overrides: Mapping[str, tuple[Any, str]] | None = None) -> Config:
    """The configuration of a file, or the defaults without one.

    Args:
        path: a YAML file; fields that it leaves out keep their defaults.
        overrides: dotted field → value and where it came from (for example an option's name); they win.

    Raises:
        ConfigError: the file cannot be read, or its contents cannot be used.
    """
    document = _Document("the configuration", {}, {})
    if path is not None:
        document = _read(path)
    for field, (value, origin) in (overrides or {}).items():
        document.set(field, value, origin)
    try:
        return validated(Config, document)
    except DocumentError as error:
        raise ConfigError(list(error.problems)) from None


@dataclass(slots=True)
class _Document(Document):
    """A file's values, over which options may be laid."""

    def set(self, field: str, value: Any, origin: str) -> None:
        path = tuple(field.split("."))
        section = self.values
        for name in path[:-1]:
            inner = section.get(name)
            if not isinstance(inner, dict):
                # Something else than a section stands in the file; that is the problem to report first.
                if inner is not None:
                    return
                inner = section[name] = {}
            section = inner
        section[path[-1]] = value
        self.lines[path] = origin


def load_system_config(path: Path | None, checkpoint: Path | None) -> Config:
    """The configuration of a system, as commands take it: a file, and a checkpoint that wins over the file's.

    Args:
        path: the file; None: the defaults.
        checkpoint: what `--checkpoint` says; None: the file's own.

    Raises:
        ConfigError: see `load_config`.
    """
    overrides = {} if checkpoint is None else {"model.checkpoint": (str(checkpoint), "--checkpoint")}
    return load_config(path, overrides)


def _read(path: Path) -> _Document:
    try:
        read = read_document(path, "sections such as `gateway:`, one a line")
    except DocumentError as error:
        raise ConfigError(list(error.problems)) from None
    return _Document(read.name, read.values, read.lines)
