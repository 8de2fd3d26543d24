"""Answers on disk: one line of JSON each, append-only, so that a run that was killed can be resumed.

The key of an answer is the record's id, the digest of the settings, the variant and the digest of the question: after a
change of the model, the settings or the record it is requested again.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from echovlm_ray.checkpoint.atomic import naming_file
from echovlm_ray.evaluation.baselines import Variant

Key = tuple[str, str, str, str]


class Answer(BaseModel):
    """One answer with its provenance.

    Attributes:
        id: the record's.
        settings: see `settings.settings_digest`.
        variant: the model or a baseline.
        question: see `items.question_digest`.
        text: the answer; empty if the request was refused.
        refused: why the service refused the request; empty if it answered.
        finish_reason: "stop" or "length".
        completion_tokens: how many it wrote.
        expert_set_id: the expert set of the answer.
        organs: organ → its share of the routed tokens.
        organ_source: how the organs were found.
        seconds: the time from the request to the last token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    settings: str
    variant: Variant
    question: str
    text: str
    refused: str = ""
    finish_reason: str = ""
    completion_tokens: int = 0
    expert_set_id: str = ""
    organs: dict[str, float] = {}
    organ_source: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> Key:
        """The key of the answer."""
        return self.id, self.settings, self.variant, self.question


class AnswerLogError(ValueError):
    """The file of answers is unusable; the text has the reason."""


class AnswerLog:
    """The file of answers. Locked by one process at a time; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and reads its answers.

        Raises:
            AnswerLogError: another process writes to it, or a line in it is no answer.
            OSError: it cannot be opened.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file: IO[bytes] = os.fdopen(descriptor, "a+b")
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AnswerLogError(
                    f"another evaluation writes to {path}: wait for it, or use another folder"
                ) from None
            self._answers = {answer.key: answer for answer in self._read()}
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """How many answers there are."""
        return len(self._answers)

    def get(self, key: Key) -> Answer | None:
        """The answer to a question, if it was given already."""
        return self._answers.get(key)

    def add(self, answer: Answer) -> None:
        """Appends an answer durably.

        Raises:
            OSError: the disk is full.
        """
        with naming_file(self.path):
            self._file.write(answer.model_dump_json(exclude_defaults=True).encode() + b"\n")
            self._file.flush()
        self._answers[answer.key] = answer

    def close(self) -> None:
        """Syncs the file to disk and releases the lock."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()

    def _read(self) -> Iterable[Answer]:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                # The process was killed while it wrote this line.
                self._file.truncate(end)
                return
            end += len(line)
            yield parse_answer(line, self.path, number)


def parse_answer(line: bytes, path: Path, number: int) -> Answer:
    """The answer in one line.

    Raises:
        AnswerLogError: there is none in it.
    """
    try:
        return Answer.model_validate(json.loads(line))
    except (ValueError, ValidationError, RecursionError):
        raise AnswerLogError(
            f"{path}, line {number} is no answer: remove the line, and it will be asked for again"
        ) from None


def read_answers(path: Path) -> dict[Key, Answer]:
    """Reads the answers of a file without changing it. An incomplete last line is ignored.

    Raises:
        AnswerLogError: a line in it is no answer.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        answers = [parse_answer(line, path, number) for number, line in enumerate(file, 1) if line.endswith(b"\n")]
    return {answer.key: answer for answer in answers}
