"""The gateway's use case without a transport: plain types for the request, events as output, and our own errors.

Nothing here depends on gRPC. `serving.grpc.gateway` adapts it to `echovlm.v1.EchoVLM`; other transports need only an
adapter.
"""
