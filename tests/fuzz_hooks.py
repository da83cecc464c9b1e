"""What the fuzzer of the API is told beside the document: what is no wrong input; msgpack, written and read."""

from typing import Any

import msgspec
import schemathesis

from tasks import codec


@schemathesis.hook
def filter_case(_: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """HTTP lets a client send headers that nobody knows, so they are no wrong input."""
    return not any(name.lower().startswith("x-schemathesis-") for name in case.headers or ())


@schemathesis.serializer("application/msgpack")
def write(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """A body as the public clients send it; for a number that msgpack has not, the byte that it never uses."""
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:
        return b"\xc1"


@schemathesis.deserializer("application/msgpack")
def read(_: schemathesis.DeserializationContext, response: schemathesis.Response) -> Any:
    """An answer as its schema describes it: arrays are lists."""
    return msgspec.json.decode(codec.dump_json(codec.jsonable(codec.unpack(response.content))))
