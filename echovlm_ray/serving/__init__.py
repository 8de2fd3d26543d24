"""The parts as gRPC services, and the Ray Serve applications that run them."""
