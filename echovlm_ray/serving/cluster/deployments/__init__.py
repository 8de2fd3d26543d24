"""The Ray Serve deployments: each builds one part, starts its gRPC server, and publishes its address."""
