"""Item results as clients read them, made in one place for all families: dtypes, names and packing."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from common.errors import RequestError
from tasks import codec

OUTPUT_DTYPES: Final = frozenset({"float32", "float16", "int8", "uint8", "binary", "ubinary"})
_FLOOR: Final = np.float32(1e-12)
"""Keeps a row of zeros from being divided by zero."""


def check_output_dtype(dtype: str) -> None:
    """RequestError if clients cannot be given this dtype."""
    if dtype not in OUTPUT_DTYPES:
        raise RequestError(
            f"output_dtype {dtype!r} is not one of {', '.join(sorted(OUTPUT_DTYPES))}", param="params.output_dtype"
        )


def quantize(rows: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Turn float32 rows ``[N, D]`` into the dtype a client asked for.

    ``int8`` is symmetric by row (the largest magnitude becomes 127), ``uint8`` spans each row's minimum to maximum,
    ``binary`` and ``ubinary`` hold one bit a number, eight to a byte (``[N, ceil(D / 8)]``).
    """
    if dtype == "float32":
        return np.ascontiguousarray(rows, dtype=np.float32)
    if dtype == "float16":
        return rows.astype(np.float16)
    if dtype in ("binary", "ubinary"):
        return np.asarray(np.packbits(rows > 0, axis=-1))
    if dtype == "int8":
        scale = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), _FLOOR) / np.float32(127)
        return np.asarray(np.rint(rows / scale), dtype=np.int8)
    check_output_dtype(dtype)
    low = rows.min(axis=-1, keepdims=True)
    step = np.maximum(rows.max(axis=-1, keepdims=True) - low, _FLOOR) / np.float32(255)
    return np.asarray(np.rint((rows - low) / step), dtype=np.uint8)


def dense_items(items: Sequence[Any], rows: npt.NDArray[np.float32], dtype: str = "float32") -> bytes:
    """The msgpack list of item results of one request with a dense output: one row of ``rows`` ``[N, D]`` per item."""
    dims = rows.shape[1]
    values = quantize(rows, dtype)
    return codec.pack(
        [
            item_result(item, dense={"dims": dims, "dtype": dtype, "values": codec.array_map(row)})
            for item, row in zip(items, values, strict=True)
        ]
    )


def dense_output(values: npt.NDArray[Any], *, dims: int, dtype: str) -> dict[str, Any]:
    """A dense output as clients read it; ``values`` is one row of ``quantize``, ``dims`` its width before that."""
    return {"dims": dims, "dtype": dtype, "values": codec.array_map(values)}


def sparse_output(
    indices: npt.NDArray[np.int32], values: npt.NDArray[np.float32], *, dims: int, dtype: str
) -> dict[str, Any]:
    """A sparse output as clients read it; its weights stay float32 but for ``float16``."""
    kept = "float16" if dtype == "float16" else "float32"
    return {
        "dims": dims,
        "dtype": kept,
        "indices": codec.array_map(indices.astype(np.int32, copy=False)),
        "values": codec.array_map(quantize(values, kept)),
    }


def multivector_output(rows: npt.NDArray[np.float32], *, dtype: str) -> dict[str, Any]:
    """A multivector output as clients read it: ``rows`` ``[tokens, D]``, quantised row by row."""
    tokens, dims = rows.shape
    values = quantize(rows, dtype)
    return {"token_dims": dims, "num_tokens": tokens, "dtype": dtype, "values": codec.array_map(values)}


def item_list(items: Sequence[Any], outputs: Sequence[Mapping[str, Any]]) -> bytes:
    """The msgpack list of item results of one request: the outputs of each item, by name."""
    return codec.pack([item_result(item, **one) for item, one in zip(items, outputs, strict=True)])


def item_result(item: Any, **outputs: Mapping[str, Any]) -> dict[str, Any]:
    """One item's result: its outputs by name, and its id if it has one."""
    name = item.get("id") if isinstance(item, Mapping) else None
    return dict(outputs) if name is None else {"id": name, **outputs}


def item_errors(errors: Mapping[int, RequestError]) -> RequestError:
    """The one error of a request with refused items: the first item's, with all of them under ``items``."""
    first = errors[min(errors)]
    listed = [{"index": index, **error.as_dict()} for index, error in sorted(errors.items())]
    return type(first)(first.message, param=first.param, details={**first.details, "items": listed})
