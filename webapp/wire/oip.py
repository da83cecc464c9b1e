"""Open Inference Protocol V2: tensors of texts in, tensors of vectors out, as JSON or in the binary extension.

A request is JSON, or JSON followed by the raw tensors that it describes; a header says where the JSON ends. A tensor of
BYTES is, for each element, its length as four little-endian bytes and the element itself.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
from flask import Response, request

from common.errors import FarmError, RequestError
from config_db.spec import ModelSpec
from tasks import codec
from tasks.messages import Outcome
from webapp import problems
from webapp.openapi.declared import answers_errors_as
from webapp.wire.headers import BINARY, JSON, set_common
from webapp.wire.raw_bodies import read_raw

JSON_LENGTH: Final = "Inference-Header-Content-Length"
TEXT: Final = "text"
VECTORS: Final = "embedding"
VERSION: Final = "1"
_LENGTH: Final = struct.Struct("<I")


class TensorParameters(msgspec.Struct):
    """What is said of one tensor beside its form."""

    binary_data_size: int | None = None
    binary_data: bool | None = None


class InputTensor(msgspec.Struct):
    """One tensor of a request."""

    name: str
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[Any] | None = None
    parameters: TensorParameters | None = None


class OutputWanted(msgspec.Struct):
    """One tensor that is asked for."""

    name: str
    parameters: TensorParameters | None = None


class RequestParameters(msgspec.Struct):
    """What holds for all tensors of a request."""

    binary_data_output: bool = False


class InferBody(msgspec.Struct):
    """The JSON part of an inference request."""

    inputs: list[InputTensor]
    id: str | None = None
    outputs: list[OutputWanted] | None = None
    parameters: RequestParameters | None = None


class OutputTensor(TypedDict):
    """One tensor of an answer; its numbers follow the JSON if they are not in it."""

    name: str
    datatype: Literal["FP32"]
    shape: list[int]
    data: NotRequired[list[float]]
    parameters: NotRequired[dict[str, int]]


class InferAnswer(TypedDict):
    """The JSON part of an answer to an inference request."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: NotRequired[str]


class TensorMetadata(TypedDict):
    """The form of a tensor; -1: any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """A model as clients of this protocol read it."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(TypedDict):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class ModelReady(TypedDict):
    """Whether a model can be asked."""

    name: str
    ready: bool


class Live(TypedDict):
    """This process answers."""

    live: Literal[True]


class TextProblem(TypedDict):
    """An error as clients of this protocol read it: one text."""

    error: str


def read(max_bytes: int) -> tuple[InferBody, list[str]]:
    """The current request, and the texts of its one tensor.

    Raises:
        RequestError: not of this protocol; ``param`` is the field's path.
    """
    raw = read_raw(max_bytes)
    said = request.headers.get(JSON_LENGTH)
    if said is not None and not (said.isascii() and said.isdigit() and int(said) <= len(raw)):
        raise RequestError(f"{JSON_LENGTH} is a number of bytes within the body", param=JSON_LENGTH)
    length = len(raw) if said is None else int(said)
    try:
        body = msgspec.json.decode(raw[:length], type=InferBody)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:  # ValueError: what is no UTF-8
        raise RequestError(f"the request is not of the Open Inference Protocol: {error}") from error
    if len(body.inputs) != 1:
        raise RequestError("a request has one input: a tensor of texts", param="inputs")
    return body, _texts(body.inputs[0], memoryview(raw)[length:])


def wants_binary(body: InferBody) -> bool:
    """Whether the vectors shall follow the JSON; RequestError for an output that there is not."""
    for at, output in enumerate(body.outputs or ()):
        if output.name != VECTORS:
            raise RequestError(
                f"there is no output {output.name[:100]!r}: it is {VECTORS}", param=f"outputs[{at}].name"
            )
    by_default = body.parameters is not None and body.parameters.binary_data_output
    asked = [output.parameters for output in body.outputs or () if output.parameters is not None]
    said = next((one.binary_data for one in asked if one.binary_data is not None), None)
    return by_default if said is None else said


def vectors(body: InferBody, outcome: Outcome, *, binary: bool) -> Response:
    """The answer to an inference request."""
    items = codec.unpack(bytes(outcome.result))
    rows = np.stack([codec.array_of(item["dense"]["values"]) for item in items]).astype("<f4")
    output = OutputTensor(name=VECTORS, datatype="FP32", shape=list(rows.shape))
    head = InferAnswer(model_name=outcome.model, model_version=VERSION, outputs=[output])
    if body.id is not None:
        head["id"] = body.id
    if not binary:
        output["data"] = rows.ravel()  # type: ignore[typeddict-item]  # an array is written as a list
        response = Response(codec.dump_json(head), content_type=JSON)
    else:
        output["parameters"] = {"binary_data_size": rows.nbytes}
        said = codec.dump_json(head)
        response = Response(said + _bytes(rows), content_type=BINARY)
        response.headers[JSON_LENGTH] = str(len(said))
    set_common(response)
    return response


def metadata(spec: ModelSpec) -> ModelMetadata:
    """A model as clients of this protocol read it."""
    return {
        "name": spec.id,
        "versions": [VERSION],
        "platform": "farmhand",
        "inputs": [{"name": TEXT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": VECTORS, "datatype": "FP32", "shape": [-1, spec.dims.get("dense", -1)]}],
    }


@answers_errors_as(TextProblem)
def problem(error: FarmError) -> Response:
    """An error as clients of this protocol read it: one text."""
    response = problems.problem(error)
    field = f" ({error.param})" if error.param else ""
    response.set_data(codec.dump_json({"error": f"{error.message}{field}"}))
    return response


def _texts(tensor: InputTensor, tail: memoryview) -> list[str]:
    count = 1
    for extent in tensor.shape:
        if extent < 1:
            raise RequestError("a shape is made of positive numbers", param="inputs[0].shape")
        count *= extent
    size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
    if size is None:
        elements: Sequence[Any] = _flat(tensor.data or [])
    elif tensor.data is not None:
        raise RequestError("a tensor has its data in the JSON or after it, not both", param="inputs[0].data")
    else:
        elements = _elements(tail, size)
    if len(elements) != count:
        message = f"{len(elements)} elements are not the {count} that the shape says"
        raise RequestError(message, param="inputs[0].shape")
    return [_text(element, at) for at, element in enumerate(elements)]


def _flat(data: list[Any]) -> list[Any]:
    """Nested lists, one below the other at most, as one."""
    return [one for row in data for one in (row if isinstance(row, list) else [row])]


def _elements(tail: memoryview, size: int) -> list[bytes]:
    if size != len(tail):
        message = f"{len(tail)} bytes follow the JSON, not the {size} that the tensor says"
        raise RequestError(message, param="inputs[0].parameters.binary_data_size")
    found, at = [], 0
    while at < size:
        end = at + _LENGTH.size
        length = _LENGTH.unpack(tail[at:end])[0] if end <= size else size
        if end + length > size:
            raise RequestError("an element is longer than its tensor", param="inputs[0]")
        found.append(bytes(tail[end : end + length]))
        at = end + length
    return found


def _text(element: Any, at: int) -> str:
    if isinstance(element, str):
        return element
    try:
        return bytes(element).decode() if isinstance(element, bytes) else str(element.decode())
    except (UnicodeDecodeError, AttributeError) as error:
        raise RequestError("an element is no UTF-8 text", param=f"inputs[0].data[{at}]") from error


def _bytes(rows: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(rows).tobytes()
