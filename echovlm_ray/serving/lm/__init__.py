"""The language-model server, called router here: a gRPC service over the engine, and the experts of each request."""
