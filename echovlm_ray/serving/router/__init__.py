"""The router: one gRPC service over the engine, and the experts that each of its requests is pinned to."""

from echovlm_ray.serving.router.request import ServedModel
from echovlm_ray.serving.router.service import RouterService

__all__ = ["RouterService", "ServedModel"]
