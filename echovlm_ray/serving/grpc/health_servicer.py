"""The standard health service: Check, Watch and List.

grpcio's servicer has a lock while it writes to a watcher, so a watcher that does not read would block every change.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echovlm_ray.errors import OverloadedError, UnknownServiceError
from echovlm_ray.serving.grpc.recycled import RecycledPlaces
from echovlm_ray.serving.grpc.sender import sender_of

# When there are more, one of the caller with the most ends.
MAX_WATCHERS = 1000

Status = health_pb2.HealthCheckResponse


class _Watcher:
    """One call of Watch."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_replaced = False

    def replace(self) -> None:
        """Ends the call: another one gets its place."""
        self.is_replaced = True
        self.news.set()


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The status of each service. Belongs to one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": Status.SERVING}
        self._ending = False
        self._places = RecycledPlaces(MAX_WATCHERS)
        self._watchers: set[_Watcher] = set()

    async def set(self, service: str, status: int) -> None:
        """Says so of a service from now on; after `enter_graceful_shutdown` nothing changes any more."""
        if not self._ending and self._statuses.get(service) != status:
            self._statuses[service] = status
            self._announce()

    async def enter_graceful_shutdown(self) -> None:
        """Says of all services, for good, that they do not serve."""
        self._ending = True
        self._statuses = dict.fromkeys(self._statuses, Status.NOT_SERVING)
        self._announce()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> health_pb2.HealthCheckResponse:
        """The state of one service.

        Raises:
            UnknownServiceError: it has no status.
        """
        status = self._statuses.get(request.service)
        if status is None:
            raise UnknownServiceError("nothing is known of the health of a service of this name; List names all")
        return Status(status=status)

    async def List(
        self, request: health_pb2.HealthListRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> health_pb2.HealthListResponse:
        """The states of all services."""
        return health_pb2.HealthListResponse(
            statuses={service: Status(status=status) for service, status in self._statuses.items()}
        )

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state of one service now and whenever it changes; of one that is not known, that it is not.

        Raises:
            OverloadedError: too many watch.
        """
        watcher = _Watcher()
        self._watchers.add(watcher)
        last = None
        try:
            with self._places.place(sender_of(context), watcher.replace):
                while not watcher.is_replaced:
                    watcher.news.clear()
                    status = self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
                    if status != last:
                        last = status
                        yield Status(status=status)
                    await watcher.news.wait()
        finally:
            self._watchers.discard(watcher)
        raise OverloadedError(
            f"{MAX_WATCHERS} calls watch the health of services, which is the limit, and one that came later got the "
            "place of this one: watch again",
            reason="health_checks",
        )

    def _announce(self) -> None:
        for watcher in self._watchers:
            watcher.news.set()
