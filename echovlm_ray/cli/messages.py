"""Messages of the contracts for programs that read `--json`."""

from typing import Any

from google.protobuf.message import Message


def message_as_dict(message: Message) -> dict[str, Any]:
    """All fields by their names; what is optional and not set is None.

    Not protobuf's own JSON, in which 64-bit numbers are strings.
    """
    fields = message.DESCRIPTOR.fields
    unset = {field.name for field in fields if field.has_presence and not message.HasField(field.name)}
    return {field.name: None if field.name in unset else _plain(getattr(message, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return message_as_dict(value)
    return value if isinstance(value, str | int | float) else [_plain(item) for item in value]
