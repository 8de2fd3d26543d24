import time

import pytest

from echovlm_ray.errors import PartUnavailableError
from echovlm_ray.serving.grpc.absence import Absence
from echovlm_ray.serving.lm.router_client import RouterClient
from echovlm_ray.serving.vision.client import VisionClient
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import router_pb2


def test_all_wait_until_the_same_moment() -> None:
    now = [100.0]
    absence = Absence(15.0, lambda: now[0])
    assert absence.ends() == 115.0
    now[0] = 112.0
    assert absence.ends() == 115.0
    now[0] = 120.0
    assert absence.ends() == 115.0, "what comes later does not wait"
    absence.is_over()
    assert absence.ends() == 135.0, "another absence"
    now[0] = 151.0
    assert absence.ends() == 166.0, "not looked at for so long, it may have been back meanwhile"


async def test_only_the_first_requests_wait_for_a_part_that_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []

    def nowhere() -> list[str]:
        looks.append(0.0)
        return []

    for module in ("lm.router_client", "vision.client"):
        monkeypatch.setattr(f"echovlm_ray.serving.{module}.RETRY_FOR_S", 0.5)
    router, vision = RouterClient(nowhere), VisionClient(nowhere, PLAIN_CHANNELS)

    async def ask_router() -> None:
        deadline = time.monotonic() + 60
        async for _ in router.generate(router_pb2.RouterGenerateRequest(), deadline=deadline, request_id="r"):
            raise AssertionError

    async def ask_vision() -> None:
        await vision.encode([], time.monotonic() + 60)

    for ask in (ask_router, ask_vision):
        counts = []
        for _ in range(2):
            looks.clear()
            with pytest.raises(PartUnavailableError, match="no replica is running"):
                await ask()
            counts.append(len(looks))
        assert counts[0] > 1
        assert counts[1] == 1
