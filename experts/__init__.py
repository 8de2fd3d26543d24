"""One organ's expert group: bundles, registry, loaded versions, kernels, and its gRPC service."""
