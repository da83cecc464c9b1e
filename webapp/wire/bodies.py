"""Request bodies: bytes in, typed structs out. Whatever is wrong with a body is a RequestError that names the field."""

import re
from math import isfinite
from typing import Annotated, Any, Final, TypeVar

import msgspec

from common.errors import RequestError
from config_db.refusals import in_words
from webapp.wire.headers import is_msgpack_body
from webapp.wire.raw_bodies import read_raw

T = TypeVar("T")
MAX_DEPTH: Final = 32
"""How deep a free-form value may be nested."""
_WHERE: Final = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(\w+)`")


def _says(meaning: str, **schema: Any) -> msgspec.Meta:
    """What a field means, for the document of the API; and what is asked of it beyond its type, by who checks that."""
    return msgspec.Meta(description=meaning, extra_json_schema=schema or None)


Options = Annotated[
    dict[str, Any],
    _says(
        "Settings of the model for this request: `profile`, `lora`, `is_query`, `dimensions`, and those of its family."
    ),
]
Instruction = Annotated[str, _says("What the texts are for, for models that take an instruction.")]


class ImageFile(msgspec.Struct, omit_defaults=True):
    """The bytes of an image file (in JSON standard base64), and what their sender takes them for.

    Or, on farms that fetch images, ``url``: where it stands.
    """

    data: bytes = b""
    format: str | None = None
    url: str | None = None


class Item(msgspec.Struct):
    """One input of a request. What no model reads stays undecoded."""

    id: Annotated[str, _says("Echoed in the result.")] | None = None
    text: str | None = None
    images: Annotated[list[ImageFile], _says("One image, for models that take images.")] | None = None
    audio: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    video: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    document: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    metadata: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


Items = Annotated[list[Item], _says("The inputs, in order.", minItems=1)]


class EncodeParams(msgspec.Struct):
    """How to encode."""

    output_types: Annotated[list[str], _says("Of `dense`, `sparse` and `multivector`; the model's own.")] | None = None
    instruction: Instruction | None = None
    output_dtype: Annotated[str, _says("The type of the numbers; `float32`.")] | None = None
    options: Options | None = None


class EncodeBody(msgspec.Struct):
    """The body of an encode request."""

    items: Items
    params: EncodeParams | None = None


class ScoreBody(msgspec.Struct):
    """The body of a score request; how to score stands at its top, not under ``params``."""

    query: Item
    items: Items
    instruction: Instruction | None = None
    options: Options | None = None
    params: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class ExtractParams(msgspec.Struct):
    """What to extract."""

    labels: Annotated[list[str], _says("What to look for, for models that take any labels.")] | None = None
    output_schema: Annotated[dict[str, Any], _says("What to look for, in the form of the model's family.")] | None = (
        None
    )
    instruction: Instruction | None = None
    options: Options | None = None


class ExtractBody(msgspec.Struct):
    """The body of an extract request."""

    items: Items
    params: ExtractParams | None = None


def read(kind: type[T], *, max_bytes: int) -> T:
    """The body of the current request as ``kind``.

    Raises:
        MediaTypeError: neither JSON nor msgpack, or compressed.
        BodyTooLargeError: more than ``max_bytes``.
        BodyTimeoutError: it came too slowly.
        RequestError: broken, or not of this shape; ``param`` is the field's path.
    """
    as_msgpack = is_msgpack_body()
    raw = read_raw(max_bytes)
    if not raw:
        raise RequestError("the request has no body")
    try:
        body: T = _decoder(kind, as_msgpack=as_msgpack).decode(raw)
    except msgspec.ValidationError as error:
        raise _mismatch(str(error)) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
        format_name = "msgpack" if as_msgpack else "JSON"
        raise RequestError(f"the body is not valid {format_name}: {error}") from error
    return body


def check_free_form(value: object, *, param: str, depth: int = 0, max_depth: int = MAX_DEPTH) -> None:
    """RequestError unless a free-form value is made of finite numbers, texts, flags, lists and maps named by texts."""
    if depth > max_depth:
        raise RequestError(f"{param} is nested too deeply", param=param)
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RequestError(f"{param} has a name that is not text", param=param)
            check_free_form(inner, param=f"{param}.{name}"[:200], depth=depth + 1, max_depth=max_depth)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            check_free_form(inner, param=f"{param}[{at}]"[:200], depth=depth + 1, max_depth=max_depth)
    elif isinstance(value, float):
        if not isfinite(value):
            raise RequestError(f"{param} is not a finite number", param=param)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise RequestError(f"{param} is too large a number", param=param)
    elif value is not None and not isinstance(value, str):
        raise RequestError(f"{param} is of a kind that cannot be read here", param=param)


def _mismatch(message: str) -> RequestError:
    """The decoder ends its message with the path; it becomes ``param``."""
    where = _WHERE.search(message)
    what = in_words(message[: where.start()] if where else message)
    path = where.group(1).replace("[...]", "") if where else ""
    if missing := _MISSING.search(what):
        path = f"{path}.{missing.group(1)}" if path else missing.group(1)
    return RequestError(f"{what}, at {path}" if path else what, param=path or None)


def _decoder(kind: type, *, as_msgpack: bool) -> Any:
    """One decoder for each kind of body and format, made once."""
    known = _decoders.get((kind, as_msgpack))
    if known is None:
        made: Any = msgspec.msgpack.Decoder(kind) if as_msgpack else msgspec.json.Decoder(kind)
        known = _decoders[kind, as_msgpack] = made
    return known


_decoders: dict[tuple[type, bool], Any] = {}
