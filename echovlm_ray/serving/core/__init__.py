"""The use case of a gateway, without a transport: a request in plain types, events out, errors of our own.

Nothing here knows gRPC. `serving.grpc.gateway` adapts it to `echovlm.v1.EchoVLM`; another transport is another adapter.
"""
