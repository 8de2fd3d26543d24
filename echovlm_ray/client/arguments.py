"""Validates arguments before anything is sent."""

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from echovlm_ray.client.errors import FieldViolation, InvalidRequestError

# gRPC counts deadlines in nanoseconds since 1970 and would overflow. Longer timeouts are no timeout.
MAX_TIMEOUT_S = 365 * 24 * 3600.0
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
MIN_FLOAT32 = 2.0**-149

Kind = TypeVar("Kind", bound=Message)


def invalid(field: str, description: str) -> InvalidRequestError:
    """The error about one argument."""
    violation = FieldViolation(field, description)
    return InvalidRequestError(str(violation), violations=[violation])


def text(field: str, value: object) -> str:
    """Returns a text that can be sent.

    Raises:
        InvalidRequestError: it is not a `str`, or has a lone surrogate.
    """
    if not isinstance(value, str):
        raise invalid(field, f"is a {type(value).__name__}; give a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            field,
            f"has half a character (a lone surrogate) at place {error.start}, which cannot be sent: decode its source "
            "without surrogateescape, or leave the character out",
        ) from None
    return value


def texts(field: str, values: object) -> list[str]:
    """Returns texts that can be sent. A single text needs no list.

    Raises:
        InvalidRequestError: it is not a sequence of `str`.
    """
    if isinstance(values, str):
        # A string is a sequence of characters, which is never intended here.
        return [text(field, values)]
    if isinstance(values, bytes | bytearray | memoryview) or not isinstance(values, Iterable):
        raise invalid(field, f"is a {type(values).__name__}; give a list of str")
    return [text(f"{field}[{index}]", value) for index, value in enumerate(values)]


def integer(field: str, value: Any, low: int, high: int) -> int:
    """Returns an integer from `low` to `high`, of any integer type (also numpy's) except `bool`.

    Raises:
        InvalidRequestError: it is not an integer, or out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise invalid(field, f"is a {type(value).__name__}; give a whole number")
    number = operator.index(value)
    if not low <= number <= high:
        raise invalid(field, f"is {number}; it must be from {low} to {high}")
    return number


def number(field: str, value: Any, low: float, high: float) -> float:
    """Returns a finite number from `low` to `high`; one above 0 must also be above 0 in float32.

    Raises:
        InvalidRequestError: it is not a number, NaN, or out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise invalid(field, f"is a {type(value).__name__}; give a number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise invalid(field, f"is a {type(value).__name__} that is no single number") from None
    if not low <= found <= high:
        raise invalid(field, f"is {found}; it must be from {low:g} to {high:g}")
    # 0 means "not set".
    return max(found, MIN_FLOAT32) if found > 0 else found


def timeout(field: str, value: Any) -> float | None:
    """Returns a timeout in seconds for gRPC; None and infinity are no timeout.

    Raises:
        InvalidRequestError: it is not a number above 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise invalid(field, f"is a {type(value).__name__}; give seconds, or None for no limit")
    try:
        seconds = float(value)
    except OverflowError:
        return MAX_TIMEOUT_S
    except (TypeError, ValueError):
        raise invalid(field, f"is a {type(value).__name__} that is no single number") from None
    if not seconds > 0:
        raise invalid(field, f"is {seconds}; give seconds above 0, or None for no limit")
    return None if math.isinf(seconds) else min(seconds, MAX_TIMEOUT_S)


def message(kind: type[Kind], **values: object) -> Kind:
    """Builds a message from texts, numbers, booleans and other messages; None leaves a field unset.

    Raises:
        InvalidRequestError: a value has the wrong type; the text names the field.
    """
    fields = kind.DESCRIPTOR.fields_by_name
    return kind(**{name: _fitting(name, fields[name].cpp_type, value) for name, value in values.items()})


def _fitting(name: str, cpp_type: int, value: object) -> object:
    if cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if value is not None and not isinstance(value, Message):
            raise invalid(name, f"is a {type(value).__name__}; give a message or None")
        return value
    if cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return text(name, value)
    if cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise invalid(name, f"is a {type(value).__name__}; give True or False")
        return value
    if cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return number(name, value, -MAX_FLOAT32, MAX_FLOAT32)
    return integer(name, value, 0, 2**32 - 1)
