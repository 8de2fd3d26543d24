"""The gRPC transport: the server that every replica runs, credentials and limits, and the gateway's service."""
