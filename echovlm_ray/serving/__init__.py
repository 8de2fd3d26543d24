"""Serving: the use case, its gRPC transport, the parts' services, and the Ray Serve applications that run them."""
