"""Callers that stream without pause while experts are replaced, and note all that they hear."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from echovlm_ray.client import EchoVLMClient, EchoVLMError, Text

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: greedy, so that the same experts always give the same answer."""

    organ: str
    prompt: str
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer.

    Attributes:
        version: of the organ's experts, which the answer names itself.
        began: when it was sent, on the monotonic clock.
        times: when its pieces of text arrived.
        ended: when it was complete.
    """

    asked: Asked
    version: str
    text: str
    began: float
    times: tuple[float, ...]
    ended: float

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Beginning and end of every pause between two pieces."""
        return list(zip(self.times[:-1], self.times[1:], strict=True))


def ask(client: EchoVLMClient, asked: Asked) -> Heard:
    """Sends one question and waits for its answer.

    Raises:
        EchoVLMError: it failed.
    """
    began = time.monotonic()
    times, text = [], ""
    with client.stream(
        prompt=asked.prompt,
        task="free",
        organs=[asked.organ],
        max_new_tokens=asked.new_tokens,
        timeout_s=TIMEOUT_S,
    ) as stream:
        for event in stream:
            if isinstance(event, Text):
                times.append(time.monotonic())
                text += event.text
        summary = stream.summary
    assert summary is not None
    (share,) = summary.provenance.organs
    return Heard(asked, share.bundle_version, text, began, tuple(times), time.monotonic())


@dataclass
class Streams:
    """One thread per organ, which sends its questions in turn until the block ends.

    Attributes:
        heard: the answers, in the order in which they were complete.
        failures: the errors of the others.
    """

    server: str
    organs: Sequence[str]
    prompts: Sequence[str]
    new_tokens: int
    heard: list[Heard] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def _run(self, number: int, organ: str) -> None:
        # What is lost is counted, not sent again unnoticed.
        with EchoVLMClient(self.server, retry=False) as client:
            while not self._stopping.is_set():
                prompt = self.prompts[number % len(self.prompts)]
                number += 1
                try:
                    self.heard.append(ask(client, Asked(organ, prompt, self.new_tokens)))
                except EchoVLMError as error:
                    self.failures.append(f"{organ}: {error}")

    def __enter__(self) -> Self:
        """Starts them."""
        for number, organ in enumerate(self.organs):
            thread = threading.Thread(target=self._run, args=(number, organ), daemon=True, name=f"stream-{organ}")
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for every running answer."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
