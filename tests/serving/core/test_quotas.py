"""What one caller may take, with a clock that is set by hand."""

import time
from contextlib import ExitStack

import pytest

from echovlm_ray.config import Config, GatewaySection, QuotaSection
from echovlm_ray.errors import OverloadedError
from echovlm_ray.serving.core.caller import Caller
from echovlm_ray.serving.core.quotas import Quotas

ONE, TWO = Caller(b"1" * 32), Caller(b"2" * 32, ("10.0.0.5", "ward"))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def quotas(*, max_requests: int = 64, named: dict[str, QuotaSection] | None = None, **quota: int) -> Quotas:
    return Quotas(QuotaSection(**quota), named or {}, max_requests)


def ask(own: Quotas, caller: Caller = ONE) -> None:
    with own.place(caller):
        pass


def refused(own: Quotas, caller: Caller = ONE) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught, own.place(caller):
        pass
    return caught.value


def test_one_caller_leaves_places_to_others() -> None:
    own = quotas(max_requests=64)
    with ExitStack() as held:
        for _ in range(60):
            held.enter_context(own.place(ONE))
        assert "60 requests are under way, 60 of this caller, and the last 4 of" in str(refused(own))
        ask(own, TWO)
    ask(own)


@pytest.mark.parametrize("named", [{}, {"ward": QuotaSection(concurrent=40)}])
def test_several_callers_together_leave_places_to_others(named: dict[str, QuotaSection]) -> None:
    own = quotas(max_requests=64, named=named)
    with ExitStack() as held:
        for _ in range(30):
            held.enter_context(own.place(ONE))
            held.enter_context(own.place(TWO))
        refused(own)
        refused(own, TWO)
        for number in range(4):
            other = Caller(b"%d" % number)
            held.enter_context(own.place(other))
            refused(own, other)


def test_a_gateway_with_few_places_leaves_one() -> None:
    own = quotas(max_requests=2)
    with own.place(ONE):
        refused(own)
        ask(own, TWO)
    ask(quotas(max_requests=1))


def test_so_many_at_once() -> None:
    own = quotas(concurrent=2)
    with own.place(ONE), own.place(ONE):
        assert "quota.concurrent" in str(refused(own))
        ask(own, TWO)
    with own.place(ONE), own.place(ONE):
        pass


def test_so_many_requests_a_minute(clock: Clock) -> None:
    own = quotas(requests_per_minute=6)
    for _ in range(6):
        ask(own)
    error = refused(own)
    assert "6 requests within a minute" in str(error)
    assert error.retry_after_s == pytest.approx(10)
    ask(own, TWO)
    clock.now += 9.9
    refused(own)
    clock.now += 0.2
    ask(own)
    refused(own)
    clock.now += 3600
    for _ in range(6):
        ask(own)
    # Nothing more is saved up than one minute's.
    refused(own)


def test_so_many_tokens_a_minute_and_what_is_beyond_is_owed(clock: Clock) -> None:
    own = quotas(tokens_per_minute=600)
    ask(own)
    own.charge(ONE, 900)
    error = refused(own)
    assert "600 tokens of a minute" in str(error)
    assert error.retry_after_s == pytest.approx(30.1)
    ask(own, TWO)
    clock.now += 29
    refused(own)
    clock.now += 2
    ask(own)


def test_a_named_caller_has_a_quota_of_its_own(clock: Clock) -> None:
    own = quotas(requests_per_minute=1, named={"ward": QuotaSection(requests_per_minute=3)})
    ask(own)
    refused(own)
    for _ in range(3):
        ask(own, TWO)
    refused(own, TWO)


def test_callers_that_cannot_be_told_apart_have_none() -> None:
    own = quotas(max_requests=2)
    with own.place(Caller()), own.place(Caller()), own.place(Caller()):
        own.charge(Caller(), 10**9)
    assert not own._accounts


def test_what_is_refused_costs_nothing(clock: Clock) -> None:
    own = quotas(concurrent=1, requests_per_minute=2)
    with own.place(ONE):
        for _ in range(5):
            refused(own)
    ask(own)
    refused(own)


def test_accounts_end_when_nothing_is_left_to_count(clock: Clock) -> None:
    own = quotas(requests_per_minute=6)
    for number in range(100):
        ask(own, Caller(b"%d" % number))
        clock.now += 30
    assert len(own._accounts) <= 2


@pytest.mark.parametrize("field", list(QuotaSection.model_fields))
def test_the_numbers_that_a_quota_may_be(field: str) -> None:
    for number in (1, 10**12):
        own = Quotas(QuotaSection.model_validate({field: number}), {}, 64)
        ask(own)
    for number in (0, -1, 10**400):
        with pytest.raises(ValueError, match=field):
            QuotaSection.model_validate({field: number})


@pytest.mark.parametrize("gateway", [{"quota": {"concurrent": 3}}, {"quotas": {"ward": {}}}])
def test_quotas_need_callers_that_show_who_they_are(gateway: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="callers show no credentials"):
        Config(gateway=GatewaySection.model_validate(gateway))
