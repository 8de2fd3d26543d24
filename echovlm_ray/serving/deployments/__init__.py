"""The Ray Serve deployments: each builds one part, starts its gRPC server, and tells Serve where it listens."""
