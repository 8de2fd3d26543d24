"""An expert group behind the service and the server that it has when it is served, without Ray."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from echovlm_ray.config import ExpertsSection
from echovlm_ray.serving.grpc.errors import to_status
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.group import ExpertGroup
from experts.service import ExpertGroupService, add_expert_group_to_server
from protos import expert_pb2

SERVICE_NAME = expert_pb2.DESCRIPTOR.services_by_name["ExpertGroup"].full_name


@asynccontextmanager
async def served_group(group: ExpertGroup) -> AsyncIterator[str]:
    """Serves the group while the block lasts; its address."""
    service = ExpertGroupService(group, to_status=to_status, max_queue=ExpertsSection().max_queue)
    server = GrpcServer(ServerOptions())
    server.add(add_expert_group_to_server, service, SERVICE_NAME)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)
        service.close()
