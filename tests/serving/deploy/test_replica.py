"""What all replicas do beside serving."""

import time
import weakref

import pytest

from echovlm_ray.serving.deploy import replica
from echovlm_ray.serving.deploy.replica import REST_S, Part, Replica


def test_free_memory_goes_back_once_after_every_burst_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[tuple[int, int]] = []
    work = queued = second = 0
    monkeypatch.setattr(replica, "return_free_memory", lambda: returned.append((second, work)))
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + second)
    each = Replica()
    each._part = Part(services=[], queue_length=lambda: queued, work_done=lambda: work)
    # At each second: all work until then, and what is under way.
    seconds = [(0, 0)] * 8 + [(5, 1), (9, 0)] + [(9, 0)] * 8 + [(12, 1)] * 8 + [(12, 0)] * 8
    for second, (work, queued) in enumerate(seconds):  # noqa: B007 - the part and the trim read them
        each.check_health()
    assert returned == [(9 + REST_S, 9), (25 + REST_S, 12)]


def test_what_a_burst_of_work_left_in_cycles_is_freed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    freed: list[bool] = []
    left = weakref.ref(Node())
    monkeypatch.setattr(replica, "return_free_memory", lambda: freed.append(left() is None))
    monkeypatch.setattr(replica, "REST_S", 0.0)
    each = Replica()
    each._part = Part(services=[], queue_length=lambda: 0, work_done=lambda: 1)
    for _ in range(2):
        each.check_health()
    assert freed == [True]


def test_a_part_that_stopped_working_is_replaced() -> None:
    each = Replica()
    each._part = Part(services=[], queue_length=lambda: 0, healthy=lambda: False)
    with pytest.raises(RuntimeError, match="stopped working"):
        each.check_health()
