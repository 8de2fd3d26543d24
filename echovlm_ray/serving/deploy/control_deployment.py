"""Control as a Ray Serve deployment."""

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.cluster.settings import EXPERT_PREFIX, ControlSettings, expert_application
from echovlm_ray.serving.cluster.system_id import SystemId
from echovlm_ray.serving.deploy.replica import Part, Replica, Service
from echovlm_ray.serving.grpc.server import ServerOptions
from protos import control_pb2_grpc, status_pb2_grpc

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from echovlm_ray.serving.control.organs import OrganApplications
    from echovlm_ray.serving.control.parts import ControlParts
    from echovlm_ray.serving.control.status import ApplicationState

# A failed application's message contains a trace; its last line is the error.
MAX_MESSAGE = 500
# The largest message is a manifest.
MAX_RECEIVE_BYTES = 8 * 1024 * 1024
MAX_RECEIVED_BYTES = 64 * MAX_RECEIVE_BYTES


class ControlReplica(Replica):
    """Serves `echovlm.v1.ExpertControl` and `echovlm.v1.SystemStatus`, and to Routers `echovlm.v1.RolloutFeed`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Builds Control and starts serving; `settings` are the fields of `ControlSettings`."""
        from echovlm_ray.serving.control import CONTROL_SERVICE, FEED_SERVICE, STATUS_SERVICE
        from echovlm_ray.serving.control.database_watch import DatabaseWatch
        from echovlm_ray.serving.control.operation_threads import operation_threads
        from echovlm_ray.serving.control.operators import operator_service
        from echovlm_ray.serving.control.parts import control_parts
        from echovlm_ray.serving.control.status import SystemStatusService
        from echovlm_ray.serving.control.status_sources import notices, problems, wanted_applications

        parsed = ControlSettings.model_validate(settings)
        threads = operation_threads()
        # Before any other thread starts: on Linux it applies to this thread and to those that it starts.
        os.nice(parsed.control.niceness)
        remote = parsed.experts_placement == "remote"
        state = ExitStack()
        parts = await control_parts(parsed, self._channels_of(parsed), state)
        lost = DatabaseWatch(parts.store.database, self._publish_control)
        noticed = partial(notices, parts, lost)
        operators = await operator_service(parsed, parts, threads, noticed)
        status = SystemStatusService(
            partial(wanted_applications, parts, remote=remote),
            parts.endpoints.of,
            partial(_states, parsed.system_id),
            lambda: parts.policies.current.stable.id,
            partial(problems, parts),
            parts.store.database.identity,
            noticed,
            parts.channels,
        )
        applications = _organ_applications(parsed, parts)
        blocking: list[Callable[[], object]] = [threads.shutdown]
        if remote:
            parts.controller.start()
            applications.start()
            blocking += [applications.stop, parts.controller.stop, parts.verifier.close]
        closing: list[Callable[[], object]] = [lost.stop, parts.policies.stop, *operators.closing]
        closing += [partial(asyncio.to_thread, stop) for stop in blocking]
        part = Part(
            # Operators call the public server only, which requires their token.
            services=[Service(control_pb2_grpc.add_RolloutFeedServicer_to_server, parts.feed, FEED_SERVICE)],
            queue_length=lambda: self._public.active_calls if self._public is not None else 0,
            healthy=lambda: not lost.must_restart,
            closing=[*closing, parts.endpoints.stop, parts.fleet.close, lambda: asyncio.to_thread(state.close)],
        )
        await self._start(
            parsed,
            part,
            _public_server(parsed),
            [
                Service(control_pb2_grpc.add_ExpertControlServicer_to_server, operators.service, CONTROL_SERVICE),
                Service(status_pb2_grpc.add_SystemStatusServicer_to_server, status, STATUS_SERVICE),
            ],
        )
        if remote:
            await lost.start()

    async def _publish_control(self, serving: bool) -> None:
        """The gateway queries the health of the whole server, operators that of the service."""
        from echovlm_ray.serving.control import CONTROL_SERVICE

        for service in ("", CONTROL_SERVICE):
            await self.publish_health(service, serving)


def _public_server(settings: ControlSettings) -> ServerOptions:
    section = settings.control
    return ServerOptions(
        section.host,
        section.port,
        section.tls,
        section.token_file,
        max_receive_bytes=MAX_RECEIVE_BYTES,
        max_received_bytes=MAX_RECEIVED_BYTES,
        idle_s=section.push_idle_s,
    )


def _organ_applications(settings: ControlSettings, parts: "ControlParts") -> "OrganApplications":
    from echovlm_ray.serving.cluster import ray_internals
    from echovlm_ray.serving.control.organs import OrganApplications
    from echovlm_ray.serving.control.parts import watched

    def deploy(organ: str) -> None:
        # Only here: it loads the other parts' deployments.
        from echovlm_ray.serving.deploy import applications

        applications.deploy(expert_application(organ), settings.expert_group(organ))

    return OrganApplications(
        parts.store,
        lambda: parts.controller.views,
        partial(_deployed_organs, settings.system_id),
        deploy,
        lambda organ: ray_internals.delete_applications([settings.system_id.application(expert_application(organ))]),
        lambda organ: parts.endpoints.watch(watched([organ])),
    )


def _states(system: SystemId) -> "Mapping[str, ApplicationState]":
    """Part → Serve's status of it, for one system."""
    from ray import serve

    from echovlm_ray.serving.control.status import ApplicationState

    return {
        part: ApplicationState(overview.status.value, cause(overview))
        for name, overview in serve.status().applications.items()
        if (part := system.part(name)) is not None
    }


def _deployed_organs(system: SystemId) -> set[str]:
    return {
        name.removeprefix(EXPERT_PREFIX)
        for name, state in _states(system).items()
        if name.startswith(EXPERT_PREFIX) and state.status not in ("DELETING", "NOT_STARTED")
    }


def cause(overview: "ApplicationStatusOverview") -> str:
    """Why an application is unhealthy, from its deployment's message; the application's only refers to that."""
    messages = [deployment.message for deployment in overview.deployments.values() if deployment.message]
    return brief(messages[0] if messages else overview.message)


def brief(message: str) -> str:
    """A message on one line; of a trace the last one, which has the exception's own words."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    traced = any(line.startswith(("Traceback", 'File "')) for line in lines)
    return (lines[-1] if traced else " ".join(lines))[:MAX_MESSAGE]
