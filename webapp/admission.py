"""Whether its model can serve a request: sizes, inputs, outputs and options, before anything is published."""

from collections.abc import Collection
from typing import Any, Final

import msgspec

from common.errors import ModelUnsupportedError, RequestError
from config_db.families import why_unsupported
from config_db.spec import DEFAULT_PROFILE, ModelSpec
from tasks.messages import Request
from webapp.wire.bodies import EncodeBody, EncodeParams, Item, check_free_form

OUTPUT_TYPES: Final = ("dense", "sparse", "multivector")
OUTPUT_DTYPES: Final = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
_MEDIA: Final = ("images", "audio", "video", "document")
_ABSENT: Final = (b"", b"null", b"\xc0")
_NO_PARAMS: Final = EncodeParams()


class TextItem(msgspec.Struct, omit_defaults=True):
    """An item as a text model's host reads it."""

    text: str
    id: str | None = None


def check_supported(spec: ModelSpec, own_families: Collection[str]) -> None:
    """ModelUnsupportedError if neither this release nor a family of the operator's own can serve the model."""
    reason = spec.unsupported if spec.family in own_families else why_unsupported(spec)
    if reason is not None:
        raise ModelUnsupportedError(f"model {spec.id!r} cannot be served: {reason}", param="model")


def choose_profile(spec: ModelSpec, params: EncodeParams | None) -> ModelSpec:
    """The spec of the profile that ``options.profile`` names, else the model's own.

    Raises:
        RequestError: the model has no such profile.
    """
    wanted = params.options.get("profile") if params is not None and params.options else None
    if wanted in (None, DEFAULT_PROFILE):
        return spec
    base, _, chosen = spec.id.partition(":")
    if chosen and wanted == chosen:  # the path has named it already
        return spec
    found = next((one for one in spec.profile_specs if one.id == f"{base}:{wanted}"), None)
    if found is None:
        has = f"; it has {', '.join(spec.profiles)}" if spec.profiles else ""
        raise RequestError(
            f"model {spec.id!r} has no profile {str(wanted)[:100]!r}{has}", param="params.options.profile"
        )
    return found


def check_operation(spec: ModelSpec, operation: str) -> None:
    """RequestError if the model does not do this."""
    if operation not in spec.operations:
        raise RequestError(
            f"model {spec.id!r} does not {operation}; it does {', '.join(spec.operations)}", param="model"
        )


def encode_request(spec: ModelSpec, body: EncodeBody, *, max_items: int, max_item_text_bytes: int) -> Request:
    """The request as it goes to the model's host.

    Raises:
        RequestError: the first thing that is wrong; if that is an item, ``details["items"]`` lists all that are.
    """
    check_operation(spec, "encode")
    params = body.params or _NO_PARAMS
    options = _options(params)
    return Request(
        items=_items(spec, body.items, min(max_items, spec.limits.max_items or max_items), max_item_text_bytes),
        output_types=_output_types(spec, params),
        output_dtype=_output_dtype(params, options),
        instruction=params.instruction,
        options=options,
    )


def estimate_tokens(request: Request) -> int:
    """A guess at the tokens of a text request, good enough to fill batches by."""
    return sum(len(item.text) for item in request.items) // 4 + 2 * len(request.items)


def _items(spec: ModelSpec, items: list[Item], max_items: int, max_text_bytes: int) -> list[TextItem]:
    if not items:
        raise RequestError("there are no items to encode", param="items")
    if len(items) > max_items:
        raise RequestError(f"{len(items)} items are more than the {max_items} that one request may hold", param="items")
    wrong = {
        at: error for at, item in enumerate(items) if (error := _wrong(spec, item, at, max_text_bytes)) is not None
    }
    if wrong:
        raise _first_of(wrong)
    return [TextItem(item.text, item.id) for item in items]  # type: ignore[arg-type]  # _wrong has seen that there is text


def _wrong(spec: ModelSpec, item: Item, at: int, max_text_bytes: int) -> RequestError | None:
    """What is wrong with one item."""
    text = item.text
    if item.images or item.audio or item.video or item.document:
        for kind in _MEDIA:
            if bytes(getattr(item, kind)) not in _ABSENT:
                takes = ", ".join(spec.inputs)
                return RequestError(f"model {spec.id!r} takes {takes}, not {kind}", param=f"items[{at}].{kind}")
    if text is None:
        return RequestError("an item needs text", param=f"items[{at}].text")
    # four bytes at most make one character, so most texts need not be encoded to be measured
    if len(text) * 4 + len(item.metadata) > max_text_bytes:
        size = len(text.encode("utf-8", "surrogatepass")) + len(item.metadata)
        if size > max_text_bytes:
            message = f"text and metadata of {size} bytes are more than the {max_text_bytes} that an item may have"
            return RequestError(message, param=f"items[{at}].text")
    return None


def _first_of(wrong: dict[int, RequestError]) -> RequestError:
    """One error for the request: the first item's, with all of them listed."""
    first = next(iter(wrong.values()))
    listed: list[dict[str, Any]] = [{"index": at, **error.as_dict()} for at, error in wrong.items()]
    return RequestError(first.message, param=first.param, details={"items": listed[:100]})


def _output_types(spec: ModelSpec, params: EncodeParams) -> list[str] | None:
    asked = params.output_types
    if asked is None:
        return None
    if not asked:
        raise RequestError("output_types is empty: leave it out for the model's own", param="params.output_types")
    for at, kind in enumerate(asked):
        if kind not in OUTPUT_TYPES or kind not in spec.outputs:
            has = ", ".join(kind for kind in spec.outputs if kind in OUTPUT_TYPES)
            raise RequestError(f"model {spec.id!r} gives {has}, not {kind[:100]!r}", param=f"params.output_types[{at}]")
    return list(dict.fromkeys(asked))


def _output_dtype(params: EncodeParams, options: dict[str, Any]) -> str:
    dtype = params.output_dtype
    if dtype is None:
        dtype = options.get("output_dtype")
    if dtype is None:
        return "float32"
    if dtype not in OUTPUT_DTYPES:
        raise RequestError(f"output_dtype is one of {', '.join(OUTPUT_DTYPES)}", param="params.output_dtype")
    return dtype


def _options(params: EncodeParams) -> dict[str, Any]:
    options = params.options
    if not options:
        return {}
    check_free_form(options, param="params.options")
    for name in ("lora", "lora_id"):
        if options.get(name) is not None:
            raise RequestError(f"there is no adapter {str(options[name])[:100]!r}", param=f"params.options.{name}")
    if not isinstance(options.get("is_query", False), bool):
        raise RequestError("is_query is true or false", param="params.options.is_query")
    return options
