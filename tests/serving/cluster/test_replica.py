"""What all replicas do in addition to serving."""

import pytest

from echovlm_ray.serving.cluster.deployments import replica
from echovlm_ray.serving.cluster.deployments.replica import Part, Replica


def test_free_memory_goes_back_once_after_every_burst_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    work = 0
    monkeypatch.setattr(replica, "_return_free_memory", lambda: returned.append(work))
    each = Replica()
    each._part = Part(services=[], queue_length=lambda: 0, work_done=lambda: work)
    for work in (0, 0, 5, 9, 9, 9, 9, 12, 12, 12):  # noqa: B007 - the part and the trim read it
        each.check_health()
    assert returned == [9, 12]


def test_a_part_that_stopped_working_is_replaced() -> None:
    each = Replica()
    each._part = Part(services=[], queue_length=lambda: 0, healthy=lambda: False)
    with pytest.raises(RuntimeError, match="stopped working"):
        each.check_health()


def test_memory_can_be_given_back_here() -> None:
    replica._return_free_memory()
