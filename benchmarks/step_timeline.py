"""Where the steps of a running engine spend their time, from timestamps taken inside it.

Module hooks note attention, dense MLP with shared expert, and head; the dispatcher's stopwatch notes its stages;
sampling, commits and scheduling are noted around the engine's own methods.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from echovlm_ray.engine import engine as engine_module
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sampler import next_tokens
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from router.dispatch.stopwatch import Stopwatch

# What is noted inside a layer, in order; "other" is what remains of it. Attention comes with both norms and the
# residual sum where they are compiled together.
LAYER_PARTS = ("attention", "gate", "gather", "send", "dense and shared", "wait", "scatter")
# The experts' own time, which passes elsewhere unless they are in this process.
KERNEL = "kernel"
HEAD, SAMPLING, COMMIT, SCHEDULING, LAYER = "head", "sampling", "commit", "scheduling", "layer"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that the engine's thread did, in `time.perf_counter` seconds."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """One step, from its beginning to that of the next.

    Attributes:
        rows: how many tokens every sequence computes.
        computed: when the forward pass ended; what follows is sampling, delivery and scheduling.
        spans: in the order of their ends; those of layers contain others.
    """

    rows: tuple[int, ...]
    start: float
    computed: float
    end: float
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From one beginning to the next."""
        return self.end - self.start

    def totals(self) -> dict[str, float]:
        """Seconds by name."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.name] = totals.get(span.name, 0.0) + span.seconds
        return totals


@dataclass
class Timeline:
    """What was noted so far."""

    spans: list[Span] = field(default_factory=list)
    passes: list[tuple[tuple[int, ...], float, float]] = field(default_factory=list)

    def note(self, name: str, start: float) -> None:
        """Something that began at `start` has just ended."""
        self.spans.append(Span(name, start, time.perf_counter()))

    def clear(self) -> None:
        """Forgets everything."""
        self.spans.clear()
        self.passes.clear()

    def steps(self) -> list[Step]:
        """All steps but the last, whose end was not seen."""
        steps = []
        spans = sorted(self.spans, key=lambda span: span.end)
        position = 0
        for (rows, start, computed), (_, end, _) in zip(self.passes, self.passes[1:], strict=False):
            while position < len(spans) and spans[position].end <= start:
                position += 1
            first = position
            while position < len(spans) and spans[position].end <= end:
                position += 1
            steps.append(Step(rows, start, computed, end, tuple(spans[first:position])))
        return steps


class TimelineStopwatch(Stopwatch):
    """Notes the dispatcher's stages with the time at which they ended."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline
        self._gathering = 0.0

    def add(self, stage: str, seconds: float) -> None:
        super().add(stage, seconds)
        now = time.perf_counter()
        if stage == "gather":
            # Told together with the sending that follows it.
            self._gathering = seconds
            return
        if stage == "send":
            began = now - seconds
            self._timeline.spans.append(Span("gather", began - self._gathering, began))
        self._timeline.spans.append(Span(stage, now - seconds, now))


@contextmanager
def timeline_of(engine: Engine) -> Iterator[Timeline]:
    """Notes what an engine does, for the length of the block; the engine must be idle at both ends."""
    timeline = Timeline()
    runner = engine._runner
    layers = runner.model.model.language_model.layers
    hooks = [handle for layer in layers for handle in _layer_hooks(layer, timeline)]
    hooks += _hooks(runner.model.lm_head, HEAD, timeline)
    step = runner.step

    @functools.wraps(step)
    def noted_step(chunks: Any, *others: Any) -> Any:
        started = time.perf_counter()
        results = step(chunks, *others)
        rows = tuple(chunk.end - chunk.start for chunk in chunks)
        timeline.passes.append((rows, started, time.perf_counter()))
        return results

    stopwatch, runner.dispatcher.stopwatch = runner.dispatcher.stopwatch, TimelineStopwatch(timeline)
    replaced = [
        (runner, "step", noted_step),
        (engine, "_next_chunks", _noted(engine._next_chunks, SCHEDULING, timeline)),
        (engine, "_commit", _noted(engine._commit, COMMIT, timeline)),
        (engine_module, "next_tokens", _noted(next_tokens, SAMPLING, timeline)),
    ]
    # The engine calls the two halves of a layer, not the module.
    replaced += [
        (layer, name, _noted(getattr(layer, name), LAYER, timeline)) for layer in layers for name in ("begin", "finish")
    ]
    try:
        with ExitStack() as stack:
            for owner, name, function in replaced:
                stack.enter_context(_replaced(owner, name, function))
            yield timeline
    finally:
        runner.dispatcher.stopwatch = stopwatch
        for handle in hooks:
            handle.remove()


def median_totals(steps: Sequence[Step]) -> dict[str, float]:
    """The median over steps of the seconds that each name took in a step."""
    totals = [step.totals() for step in steps]
    names = {name for counted in totals for name in counted}
    return {name: statistics.median(counted.get(name, 0.0) for counted in totals) for name in names}


def _layer_hooks(layer: EchoVLMDecoderLayer, timeline: Timeline) -> list[Any]:
    assert layer.dense_path_override is not None
    parts = {"attention": layer.attention_override or layer.self_attn, "dense and shared": layer.dense_path_override}
    return [handle for name, module in parts.items() for handle in _hooks(module, name, timeline)]


def _hooks(module: nn.Module, name: str, timeline: Timeline) -> list[Any]:
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: Any) -> None:
        timeline.note(name, started)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _noted(function: Callable[..., Any], name: str, timeline: Timeline) -> Callable[..., Any]:
    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            timeline.note(name, started)

    return noted


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute replaced for the length of the block."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
