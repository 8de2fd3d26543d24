"""One organ's expert group: bundles, registry, resident versions, kernels, and its gRPC service."""
