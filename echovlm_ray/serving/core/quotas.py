"""Quotas of callers: concurrent requests, requests a minute and tokens a minute."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf

from echovlm_ray.config import QuotaSection
from echovlm_ray.errors import OverloadedError
from echovlm_ray.serving.core.caller import Caller

# Of the places of a gateway, one in so many, but one at least, is for callers that have no request under way.
RESERVED = 16
# A place is free when one of the caller's own requests ends, which is not known beforehand.
RETRY_PLACE_S = 1.0


class Allowance:
    """A token bucket: holds what may be taken in a minute, and fills evenly. What is taken beyond is owed.

    Durations are those of the monotonic clock.
    """

    def __init__(self, per_minute: int | None) -> None:
        """Takes what may be taken in a minute; None for any number."""
        self._capacity = inf if per_minute is None else float(per_minute)
        self._level = self._capacity
        self._filled_at = time.monotonic()

    @property
    def is_full(self) -> bool:
        """Whether nothing was taken that did not come back."""
        return self._filled() == self._capacity

    def wait_s(self, amount: float) -> float:
        """How long until so much is there, at most one filling; 0 when it is."""
        missing = min(amount, self._capacity) - self._filled()
        return 0.0 if missing <= 0 else missing * 60 / self._capacity

    def take(self, amount: float) -> None:
        """Takes an amount, even if less is there."""
        self._level = self._filled() - amount

    def _filled(self) -> float:
        now = time.monotonic()
        if self._capacity < inf:
            self._level = min(self._capacity, self._level + (now - self._filled_at) * self._capacity / 60)
        self._filled_at = now
        return self._level


class _Account:
    """What one caller has taken."""

    def __init__(self, quota: QuotaSection) -> None:
        self.quota = quota
        self.under_way = 0
        self.requests = Allowance(quota.requests_per_minute)
        self.tokens = Allowance(quota.tokens_per_minute)

    @property
    def is_idle(self) -> bool:
        return not self.under_way and self.requests.is_full and self.tokens.is_full


class Quotas:
    """The accounts of all callers of one gateway. Belongs to one event loop."""

    def __init__(self, quota: QuotaSection, quotas: Mapping[str, QuotaSection], max_requests: int) -> None:
        """Takes `gateway.quota`, `gateway.quotas` and `gateway.max_requests`."""
        self._quota = quota
        self._quotas = quotas
        self._reserved = max(1, max_requests // RESERVED)
        self._open_to_all = max_requests - self._reserved
        self._under_way = 0
        self._accounts: dict[bytes, _Account] = {}

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Counts a request of a caller for the block.

        Raises:
            OverloadedError: the caller has used up its quota. The text says which, and when to come back.
        """
        if not caller.id:
            # Callers that show no credentials cannot be distinguished.
            yield
            return
        account = self._account(caller)
        self._check_places(account)
        _check(account)
        self._under_way += 1
        account.under_way += 1
        account.requests.take(1)
        try:
            yield
        finally:
            account.under_way -= 1
            self._under_way -= 1

    def _check_places(self, account: _Account) -> None:
        if account.under_way and self._under_way >= self._open_to_all:
            raise OverloadedError(
                f"{self._under_way} requests are under way, {account.under_way} of this caller, and the last "
                f"{self._reserved} of gateway.max_requests are for callers that have none: send the request again when "
                "one has ended",
                RETRY_PLACE_S,
                reason="max_requests",
            )

    def charge(self, caller: Caller, num_tokens: int) -> None:
        """Counts tokens of a prompt or an answer."""
        if caller.id:
            self._account(caller).tokens.take(num_tokens)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller.id)
        if account is None:
            for known in [known for known, other in self._accounts.items() if other.is_idle]:
                del self._accounts[known]
            quota = next((self._quotas[name] for name in caller.names if name in self._quotas), self._quota)
            account = self._accounts[caller.id] = _Account(quota)
        return account


def _check(account: _Account) -> None:
    quota = account.quota
    if quota.concurrent is not None and account.under_way >= quota.concurrent:
        raise OverloadedError(
            f"{account.under_way} requests of this caller are under way and that is the limit (quota.concurrent): "
            "send the request again when one has ended",
            RETRY_PLACE_S,
            reason="quota.concurrent",
        )
    if wait_s := account.requests.wait_s(1):
        raise OverloadedError(
            f"this caller has sent {quota.requests_per_minute} requests within a minute and that is the limit "
            f"(quota.requests_per_minute): send the request again in {wait_s:.1f} seconds",
            wait_s,
            reason="quota.requests_per_minute",
        )
    if wait_s := account.tokens.wait_s(1):
        raise OverloadedError(
            f"this caller has used its {quota.tokens_per_minute} tokens of a minute, prompts and answers together "
            f"(quota.tokens_per_minute): send the request again in {wait_s:.1f} seconds",
            wait_s,
            reason="quota.tokens_per_minute",
        )
