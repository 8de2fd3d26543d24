"""A Ray Serve replica that imports torch, starts a gRPC server, and does nothing: what no expert group can be below."""


class EmptyReplica:
    """The server listens on a port of the system's choice and answers no call."""

    async def __init__(self, torch_threads: int) -> None:  # type: ignore[misc] # Serve awaits it
        """Imports torch and starts the server."""
        import grpc
        import torch

        torch.set_num_threads(torch_threads)
        self._server = grpc.aio.server()
        self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
