"""Control as a Ray Serve deployment."""

from collections.abc import Mapping
from typing import Any

from echovlm_ray.serving.deployments.replica import Part, Replica, Service
from echovlm_ray.serving.deployments.settings import ControlSettings, deployments_of
from echovlm_ray.serving.endpoints import Endpoints
from echovlm_ray.serving.server import ServerOptions
from protos import control_pb2_grpc, status_pb2_grpc

# A failed application's message holds a trace; its last line says what was wrong.
MAX_MESSAGE = 500


class ControlReplica(Replica):
    """Serves `echovlm.v1.ExpertControl` and `echovlm.v1.SystemStatus`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `ControlSettings`."""
        from echovlm_ray.checkpoint.layout import registry_root
        from echovlm_ray.serving.control import (
            CONTROL_SERVICE,
            STATUS_SERVICE,
            ApplicationState,
            ExpertControlService,
            LiveExpertSet,
            SystemStatusService,
        )
        from echovlm_ray.serving.served import served_checkpoint
        from experts.registry import Registry

        parsed = ControlSettings.model_validate(settings)
        served = served_checkpoint(parsed.model)
        organs = served.organs if parsed.experts_placement == "remote" else ()
        endpoints = Endpoints(deployments_of(organs))
        endpoints.start()
        live = LiveExpertSet(served.expert_set)

        def states() -> Mapping[str, ApplicationState]:
            from ray import serve

            applications = serve.status().applications
            return {
                name: ApplicationState(overview.status.value, brief(overview.message))
                for name, overview in applications.items()
            }

        control = Service(
            control_pb2_grpc.add_ExpertControlServicer_to_server,
            ExpertControlService(Registry(registry_root(served.directory)), live),
            CONTROL_SERVICE,
        )
        sources = {name: endpoints.source(name) for name in deployments_of(organs)}
        status = Service(
            status_pb2_grpc.add_SystemStatusServicer_to_server,
            SystemStatusService(sources, states, live),
            STATUS_SERVICE,
        )
        section = parsed.control
        public = ServerOptions(section.host, section.port, section.tls, section.token_file)
        part = Part(
            services=[control, status],
            queue_length=lambda: self._public.active_calls if self._public is not None else 0,
            closing=[endpoints.stop],
        )
        await self._start(parsed, part, public, [control, status])


def brief(message: str) -> str:
    """The last line of a message: of a trace, the exception's own words."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return lines[-1][:MAX_MESSAGE] if lines else ""
