"""Refused calls are counted by reason, and by those names alone that an operator gave."""

import asyncio
from pathlib import Path

import grpc
import pytest

from echovlm_ray.config import GatewaySection, QuotaSection, RouterSection
from echovlm_ray.errors import (
    DeadlineError,
    InvalidRequestError,
    MessageTooLargeError,
    OverloadedError,
    UnauthenticatedError,
)
from echovlm_ray.serving.core.caller import Caller
from echovlm_ray.serving.core.failures import Failure, PartRefusedError
from echovlm_ray.serving.core.quotas import Quotas
from echovlm_ray.serving.grpc.gateway import server_options
from echovlm_ray.serving.grpc.refusals import MAX_NAMES, Refusals, reason_of
from tests.serving.grpc.test_limits import LIMIT, Model, bearer, method, prompt, refused, serving

RESOURCE_EXHAUSTED = 8


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnauthenticatedError("no token"), "credentials"),
        (MessageTooLargeError("long"), "message_size"),
        (OverloadedError("full"), "busy"),
        (OverloadedError("full", reason="max_requests"), "max_requests"),
        (PartRefusedError(Failure(RESOURCE_EXHAUSTED, "the router is full")), "busy"),
        (InvalidRequestError("prompt", "is empty"), ""),
        (DeadlineError("late"), ""),
        (ValueError("a bug"), ""),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    refusals = Refusals()
    refusals.add(error, ["stranger"])
    assert refusals.counts == ({(reason, ""): 1} if reason else {})


@pytest.mark.parametrize("limit", ["concurrent", "requests_per_minute", "tokens_per_minute"])
def test_each_quota_is_a_reason(limit: str) -> None:
    quotas, caller = Quotas(QuotaSection(**{limit: 1}), {}, 64), Caller(b"1" * 32)
    with quotas.place(caller):
        quotas.charge(caller, 5)
        with pytest.raises(OverloadedError) as caught, quotas.place(caller):
            pass
    assert caught.value.reason == f"quota.{limit}"


def test_only_names_of_the_configuration_are_kept_and_not_too_many() -> None:
    configured = {"ward"}
    refusals = Refusals(configured.__contains__)
    for names in (["forged"], ["forged", "ward"], [], ["ward"]):
        refusals.add(OverloadedError("full"), names)
    assert refusals.counts == {("busy", ""): 2, ("busy", "ward"): 2}
    configured |= {f"{number}" for number in range(MAX_NAMES + 50)}
    for name in sorted(configured):
        refusals.add(OverloadedError("full"), [name])
    assert len(refusals.counts) <= MAX_NAMES + 1


async def test_a_server_counts_what_it_refuses(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one ward\ntwo\n")
    tokens.chmod(0o600)
    model = Model()
    model.places = 1
    async with serving(model, token_file=tokens) as server, grpc.aio.insecure_channel(server.address) as channel:
        for metadata in ((), bearer("three"), (*bearer("three"), ("name", "ward"))):
            await refused(method(channel)(prompt("abc"), metadata=metadata))
        with model._place():
            for token in ("one", "two"):
                await refused(method(channel)(prompt("abc"), metadata=bearer(token)))
        await refused(method(channel)(b"\xff", metadata=bearer("one")))
        await method(channel)(prompt("abc"), metadata=bearer("one"))
        large = method(channel)(prompt("x" * LIMIT), metadata=bearer("one"), compression=grpc.Compression.Gzip)
        assert (await refused(large)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await asyncio.sleep(0)
        assert server.refusals.counts == {
            ("credentials", ""): 3,
            ("busy", "ward"): 1,
            ("busy", ""): 1,
            ("message_size", "ward"): 1,
        }


def test_the_gateway_knows_the_names_of_its_quotas() -> None:
    section = GatewaySection(quotas={"night": QuotaSection(concurrent=1)})
    assert server_options(section, RouterSection()).caller_names == {"night"}
