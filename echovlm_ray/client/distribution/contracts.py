"""Makes messages and stubs of the contracts' descriptors, when the package is imported.

Code that protobuf's compiler generates runs with two major versions of protobuf, and gRPC's with no older gRPC than its
own (https://protobuf.dev/support/cross-version-runtime-guarantee). Descriptors are messages, which every version reads.
They lie in a pool of their own: protobuf's default pool holds one file of a name and one message of a name, and a
service may have a `protos/tensor.proto` of its own, or the server's package in another version.
"""

from typing import Any

import grpc
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

_POOL = DescriptorPool()


def messages(serialized: bytes, module: str) -> dict[str, object]:
    """What a module of generated messages has: `DESCRIPTOR`, the messages, the enums and their values.

    Args:
        serialized: the contract's `FileDescriptorProto`. What it imports is read before it.
        module: the name of the module, which the messages name as their own.
    """
    file: FileDescriptor = _POOL.AddSerializedFile(serialized)
    names: dict[str, object] = {"DESCRIPTOR": file}
    for name, descriptor in file.message_types_by_name.items():
        names[name] = GetMessageClass(descriptor)
        names[name].__module__ = module
    for name, enum in file.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names.update(_values(enum))
    return names


def stubs(file: FileDescriptor) -> dict[str, type]:
    """A class for each service of a contract: its instances call the methods on a channel, which they are made with."""
    return {f"{name}Stub": _stub(service) for name, service in file.services_by_name.items()}


def _values(enum: EnumDescriptor) -> dict[str, int]:
    return {name: value.number for name, value in enum.values_by_name.items()}


def _stub(service: ServiceDescriptor) -> type:
    def create(self: Any, channel: grpc.Channel | grpc.aio.Channel) -> None:
        for method in service.methods:
            sent = "stream" if method.client_streaming else "unary"
            received = "stream" if method.server_streaming else "unary"
            call = getattr(channel, f"{sent}_{received}")(
                f"/{service.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    return type(f"{service.name}Stub", (), {"__init__": create})
