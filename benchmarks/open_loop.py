"""Open-loop load: requests arrive at random times, whether or not earlier ones have been answered."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMError, Summary, Text
from echovlm_ray.client.request import GenerateOptions, Image


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests arrive, in seconds from the beginning: a Poisson process, its pauses exponentially distributed.

    Args:
        rate: requests a second, on average.
        seconds: arrivals after this time are left out.
        seed: the same seed gives the same arrivals.

    Raises:
        ValueError: the rate or the time is not above 0.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError(f"rate and seconds must be above 0; they are {rate} and {seconds}")
    numbers = random.Random(seed)
    arrivals = []
    moment = numbers.expovariate(rate)
    while moment < seconds:
        arrivals.append(moment)
        moment += numbers.expovariate(rate)
    return arrivals


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    options: GenerateOptions
    images: Sequence[Image] = ()


@dataclass(slots=True)
class Outcome:
    """The result of one request. Times are seconds since its scheduled time.

    Attributes:
        lag_s: how late it was sent: the load generator's own fault.
        pieces: when its pieces of text arrived.
        end_s: when it was complete, or failed.
        tokens: how many it got; 0 until it is complete.
        error: the kind of failure; "" for none.
    """

    lag_s: float
    pieces: list[float] = field(default_factory=list)
    end_s: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def completed(self) -> bool:
        """Whether it was answered."""
        return self.tokens > 0

    @property
    def first_text_s(self) -> float:
        """Until its first text, or its end if it had none."""
        return self.pieces[0] if self.pieces else self.end_s

    @property
    def per_token_s(self) -> float:
        """The mean time between two of its tokens; 0 where there is only one."""
        return (self.end_s - self.first_text_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(slots=True)
class Trial:
    """One rate's outcomes while they come in.

    Attributes:
        arrived: requests that were sent.
        open_s: how long requests arrived: the planned time, or less when it was cut short.
        whole_s: until the last one had ended.
        cut_short: whether it was stopped; requests that had not ended are not in `outcomes`.
    """

    rate: float
    outcomes: list[Outcome] = field(default_factory=list)
    arrived: int = 0
    open_s: float = 0.0
    whole_s: float = 0.0
    cut_short: bool = False


async def offer(
    client: AsyncEchoVLMClient,
    trial: Trial,
    arrivals: Sequence[float],
    question: Callable[[int], Question],
    *,
    seconds: float,
    timeout_s: float,
    stopping: asyncio.Event,
) -> None:
    """Sends requests at their times, and waits for the answers when the last one has been sent.

    Args:
        client: without retries.
        trial: filled.
        arrivals: when to send, ascending.
        question: of the request with a number.
        seconds: how long the rate is offered, at least as long as the last arrival.
        timeout_s: each request's deadline.
        stopping: once set, nothing more is sent, and running requests are cancelled.
    """
    began = time.perf_counter()
    stop = asyncio.create_task(stopping.wait())
    running: set[asyncio.Task[None]] = set()
    try:
        async for index in _moments(began, [*arrivals, seconds], stop):
            if index < len(arrivals):
                trial.arrived += 1
                due = began + arrivals[index]
                running.add(asyncio.create_task(_ask(client, trial, due, question(index), timeout_s)))
        trial.open_s = min(seconds, time.perf_counter() - began)
        while not stop.done() and (open_tasks := {task for task in running if not task.done()}):
            await asyncio.wait({stop, *open_tasks}, return_when=asyncio.FIRST_COMPLETED)
        trial.cut_short = stop.done()
        trial.whole_s = time.perf_counter() - began
    finally:
        stop.cancel()
        for task in running:
            task.cancel()
        await asyncio.gather(stop, *running, return_exceptions=True)


async def _moments(began: float, moments: Sequence[float], stop: "asyncio.Task[bool]") -> AsyncIterator[int]:
    """Yields the number of each moment at its time; ends early when stopped."""
    for index, moment in enumerate(moments):
        pause = began + moment - time.perf_counter()
        if pause > 0:
            await asyncio.wait({stop}, timeout=pause)
        if stop.done():
            return
        yield index


async def _ask(client: AsyncEchoVLMClient, trial: Trial, due: float, question: Question, timeout_s: float) -> None:
    outcome = Outcome(lag_s=time.perf_counter() - due)
    try:
        stream = client.stream(question.images, timeout_s=timeout_s, **question.options)
        async with stream:
            async for event in stream:
                if isinstance(event, Text):
                    outcome.pieces.append(time.perf_counter() - due)
                elif isinstance(event, Summary):
                    outcome.tokens = event.completion_tokens
    except EchoVLMError as error:
        outcome.error = type(error).__name__
    outcome.end_s = time.perf_counter() - due
    trial.outcomes.append(outcome)
