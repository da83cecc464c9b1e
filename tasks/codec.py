"""Bytes in and out: arrays in msgpack as public clients expect them, and the same values as JSON.

An array is a map with *bin* keys, compatible with msgpack-numpy: ``nd`` true, ``type`` as ``<f4``, ``kind`` empty,
``shape`` and C-order ``data``. In JSON it is a nested list of numbers.
"""

from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from common.errors import RequestError

_ALLOWED: Final = frozenset(
    f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8")
)
_ALLOWED_BYTES: Final = frozenset({"|b1", "|i1", "|u1"})
MAX_DIMENSIONS: Final = 8

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


def array_map(array: npt.NDArray[Any]) -> dict[bytes, Any]:
    """The wire form of a numeric array; non-contiguous input is copied once."""
    whole = np.ascontiguousarray(array)
    return {
        b"nd": True,
        b"type": whole.dtype.str,
        b"kind": b"",
        b"shape": whole.shape,
        b"data": memoryview(whole.data).cast("B") if whole.size else b"",
    }


def array_of(wire: dict[Any, Any], *, param: str | None = None) -> npt.NDArray[Any]:
    """The read-only array a wire map describes; RequestError names what is wrong with it."""
    kind, shape, data = wire.get(b"type"), wire.get(b"shape", ()), wire.get(b"data")
    if kind not in _ALLOWED and kind not in _ALLOWED_BYTES:
        raise RequestError(f"array type {kind!r} is not one of the numeric types", param=param)
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_DIMENSIONS
        or any(not isinstance(n, int) or n < 0 for n in shape)
    ):
        raise RequestError("an array's shape is a list of at most eight non-negative integers", param=param)
    dtype = np.dtype(str(kind))
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if not isinstance(data, bytes) or len(data) != size:
        raise RequestError("an array's data has not the length that its type and shape ask for", param=param)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def is_array(value: object) -> bool:
    """Whether a decoded msgpack value is an array on the wire."""
    return isinstance(value, dict) and b"nd" in value


def pack(value: Any) -> bytes:
    """msgpack, with arrays as ``array_map``."""
    return msgspec.msgpack.encode(value, enc_hook=_enc_hook)


def unpack(raw: bytes | memoryview) -> Any:
    """Decode msgpack; maps that are arrays stay maps (see ``array_of``)."""
    return _decoder.decode(raw)


def jsonable(value: Any) -> Any:
    """A decoded msgpack value as JSON can carry it: arrays become numpy arrays, which ``dump_json`` writes as lists."""
    if isinstance(value, dict):
        if b"nd" in value:
            array = array_of(value)
            return array.astype(np.float32) if array.dtype == np.float16 else array
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [jsonable(inner) for inner in value]
    return value


def dump_json(value: Any) -> bytes:
    """JSON through orjson, numpy arrays included."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _enc_hook(value: object) -> object:
    if isinstance(value, np.ndarray):
        return array_map(value)
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} cannot be packed")
