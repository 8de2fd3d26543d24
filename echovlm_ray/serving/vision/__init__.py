"""The vision encoder as a gRPC service, and its client in the router."""
