"""Reads a configuration file: YAML in, `Config` out, and errors that name the file, the line and the fix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echovlm_ray.config import Config
from echovlm_ray.document_validation import validated
from echovlm_ray.yaml_document import Document, DocumentError, read_document


class ConfigError(DocumentError):
    """A configuration is invalid. The text has a line for each problem."""


def load_config(path: Path | None, overrides: Mapping[str, tuple[Any, str]] | None = None) -> Config:
    """Reads the configuration from a file, or returns the defaults without one.

    Args:
        path: a YAML file; fields that it leaves out keep their defaults.
        overrides: dotted field → value and its source (for example an option's name); they take precedence.

    Raises:
        ConfigError: the file is unreadable or invalid.
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
    """A file's values, with overrides."""

    def set(self, field: str, value: Any, origin: str) -> None:
        path = tuple(field.split("."))
        section = self.values
        for name in path[:-1]:
            inner = section.get(name)
            if not isinstance(inner, dict):
                # The file has another value in place of a section; that problem is reported first.
                if inner is not None:
                    return
                inner = section[name] = {}
            section = inner
        section[path[-1]] = value
        self.lines[path] = origin


def load_system_config(path: Path | None, checkpoint: Path | None) -> Config:
    """Reads the configuration of a system from a command's options: a file, and a checkpoint that overrides the file's.

    Args:
        path: the file; None for the defaults.
        checkpoint: the value of `--checkpoint`; None for the file's.

    Raises:
        ConfigError: as in `load_config`.
    """
    overrides = {} if checkpoint is None else {"model.checkpoint": (str(checkpoint), "--checkpoint")}
    return load_config(path, overrides)


def _read(path: Path) -> _Document:
    try:
        read = read_document(path, "sections such as `gateway:`, one a line")
    except DocumentError as error:
        raise ConfigError(list(error.problems)) from None
    return _Document(read.name, read.values, read.lines)
