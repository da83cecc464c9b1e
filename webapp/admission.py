"""Whether its model can serve a request: sizes, inputs, outputs and options, before anything is published."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from common.errors import ModelNotFoundError, ModelUnsupportedError, RequestError
from common.settings import WebSettings
from config_db.spec import DEFAULT_PROFILE, ModelSpec
from tasks.keep_alive import check_keep_alive
from tasks.messages import Request
from webapp.image_admission import (
    MAX_IMAGES,
    ImageItem,
    estimate_image_tokens,
    fetch_images,
    image_item,
    wrong_with_images,
)
from webapp.wire.bodies import EncodeBody, EncodeParams, Item, check_free_form

OUTPUT_TYPES: Final = ("dense", "sparse", "multivector")
OUTPUT_DTYPES: Final = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
_MEDIA: Final = ("audio", "video", "document")
_ABSENT: Final = (b"", b"null", b"\xc0")
_NO_PARAMS: Final = EncodeParams()


class TextItem(msgspec.Struct, omit_defaults=True):
    """An item as a text model's host reads it."""

    text: str
    id: str | None = None


class Admitted(NamedTuple):
    """A request that its model can serve; ``tokens`` is an estimate, ``images`` counts its items that are one."""

    spec: ModelSpec
    request: Request
    tokens: int
    images: int = 0


def check_supported(spec: ModelSpec) -> None:
    """ModelUnsupportedError if the model says that it cannot be served; of its family the worker has the last word."""
    if spec.unsupported is not None:
        raise ModelUnsupportedError(f"model {spec.id!r} cannot be served: {spec.unsupported}", param="model")


def choose_profile(spec: ModelSpec, options: Mapping[str, Any] | None, *, param: str) -> ModelSpec:
    """The spec of the profile that the options name, else the model's own; ``param``: where the options stand.

    Raises:
        RequestError: the model has no such profile.
    """
    wanted = options.get("profile") if options else None
    if wanted in (None, DEFAULT_PROFILE):
        return spec
    base, _, chosen = spec.id.partition(":")
    if chosen and wanted == chosen:  # the path has named it already
        return spec
    found = next((one for one in spec.profile_specs if one.id == f"{base}:{wanted}"), None)
    if found is None:
        has = f"; it has {', '.join(spec.profiles)}" if spec.profiles else ""
        message = f"model {spec.id!r} has no profile {str(wanted)[:100]!r}{has}"
        raise RequestError(message, param=f"{param}.profile")
    return found


def may_use(spec: ModelSpec, tenant: str) -> bool:
    """Whether a model is there for a tenant: it is open to it, and may run in pools of it."""
    open_to, run_for = spec.access.tenants, spec.placement.tenants
    return (not open_to or tenant in open_to) and (not run_for or tenant in run_for)


def check_access(spec: ModelSpec, tenant: str) -> None:
    """ModelNotFoundError for a model of others: who may not use it need not know that it is there."""
    if not may_use(spec, tenant):
        raise ModelNotFoundError(f"no model {spec.id!r} is served here", param="model", details={"nearest": []})


def check_operation(spec: ModelSpec, operation: str) -> None:
    """RequestError if the model does not do this."""
    if operation not in spec.operations:
        raise RequestError(
            f"model {spec.id!r} does not {operation}; it does {', '.join(spec.operations)}", param="model"
        )


def admit_encode(spec: ModelSpec, body: EncodeBody, settings: WebSettings) -> Admitted:
    """The request with the spec of the profile that it names."""
    spec = choose_profile(spec, body.params.options if body.params is not None else None, param="params.options")
    request = encode_request(
        spec,
        body,
        max_items=settings.max_items,
        max_item_text_bytes=settings.max_item_text_bytes,
        fetches_images=settings.fetch_images,
    )
    images = [item for item in request.items if isinstance(item, ImageItem)] if "image" in spec.inputs else []
    texts = [item for item in request.items if isinstance(item, TextItem)] if images else request.items
    tokens = estimate_tokens(texts) + sum(map(estimate_image_tokens, images))
    return Admitted(spec, request, tokens, len(images))


def encode_request(
    spec: ModelSpec, body: EncodeBody, *, max_items: int, max_item_text_bytes: int, fetches_images: bool = False
) -> Request:
    """The request as it goes to the model's host.

    Raises:
        RequestError: the first thing that is wrong; if that is an item, ``details["items"]`` lists all that are.
    """
    check_operation(spec, "encode")
    params = body.params or _NO_PARAMS
    options = read_options(params.options, param="params.options")
    check_dimensions(spec, options, param="params.options.dimensions")
    if "image" in spec.inputs:
        fetch_images(body.items, is_allowed=fetches_images)
    return Request(
        items=_encode_items(spec, body.items, max_items=max_items, max_text_bytes=max_item_text_bytes),
        output_types=_output_types(spec, params),
        output_dtype=_output_dtype(params, options),
        instruction=params.instruction,
        options=options,
    )


def check_dimensions(spec: ModelSpec, options: Mapping[str, Any], *, param: str) -> None:
    """RequestError unless dense vectors of the width that is asked for, if any is, mean something."""
    asked = options.get("dimensions")
    if asked is None:
        return
    widths = sorted({*spec.matryoshka, *(width for name, width in spec.dims.items() if name == "dense")})
    if isinstance(asked, bool) or asked not in widths:
        has = f"it gives {', '.join(map(str, widths))}" if widths else "its width is not known here"
        raise RequestError(f"the vectors of {spec.id!r} cannot be cut to {str(asked)[:20]} numbers: {has}", param=param)


def estimate_tokens(texts: Sequence[TextItem]) -> int:
    """A guess at the tokens of texts, good enough to fill batches by."""
    return sum(len(item.text) for item in texts) // 4 + 2 * len(texts)


def read_items(spec: ModelSpec, items: list[Item], *, max_items: int, max_text_bytes: int) -> list[TextItem]:
    """The items of a request that are texts, in order.

    Raises:
        RequestError: there are none, or too many, or some are wrong: all of these are listed.
    """
    _check_items(spec, items, max_items, lambda item: wrong_with(spec, item, max_text_bytes))
    return [TextItem(item.text, item.id) for item in items]  # type: ignore[arg-type]  # wrong_with has seen the text


def _encode_items(spec: ModelSpec, items: list[Item], *, max_items: int, max_text_bytes: int) -> list[Any]:
    """As ``read_items``; of a model that takes images, each item is a text or an image."""
    if "image" not in spec.inputs:
        return read_items(spec, items, max_items=max_items, max_text_bytes=max_text_bytes)

    def wrong(item: Item) -> tuple[str, str] | None:
        return wrong_with_images(item) if item.images else wrong_with(spec, item, max_text_bytes)

    _check_items(spec, items, max_items, wrong)
    images = sum(bool(item.images) for item in items)
    if images > MAX_IMAGES:
        raise RequestError(f"{images} images are more than the {MAX_IMAGES} that one request may hold", param="items")
    return [image_item(item) if item.images else TextItem(item.text or "", item.id) for item in items]


def _check_items(
    spec: ModelSpec, items: list[Item], max_items: int, wrong_with_one: Callable[[Item], tuple[str, str] | None]
) -> None:
    most = min(max_items, spec.limits.max_items or max_items)
    if not items:
        raise RequestError("there are no items: a request has at least one", param="items")
    if len(items) > most:
        raise RequestError(f"{len(items)} items are more than the {most} that one request may hold", param="items")
    wrong = {at: found for at, item in enumerate(items) if (found := wrong_with_one(item))}
    if wrong:
        raise _first_of({at: RequestError(what, param=f"items[{at}].{field}") for at, (what, field) in wrong.items()})


def wrong_with(spec: ModelSpec, item: Item, max_text_bytes: int) -> tuple[str, str] | None:
    """What is wrong with one item that is to be a text, and with which field of it."""
    text = item.text
    if item.images:
        return f"model {spec.id!r} takes {', '.join(spec.inputs)}, not images", "images"
    if item.audio or item.video or item.document:
        for kind in _MEDIA:
            if bytes(getattr(item, kind)) not in _ABSENT:
                return f"model {spec.id!r} takes {', '.join(spec.inputs)}, not {kind}", kind
    if text is None:
        return "an item needs text" if "image" not in spec.inputs else "an item needs text or an image", "text"
    if "text" not in spec.inputs:
        return f"model {spec.id!r} takes {', '.join(spec.inputs)}, not text", "text"
    # four bytes at most make one character, so most texts need not be encoded to be measured
    if len(text) * 4 + len(item.metadata) > max_text_bytes:
        size = len(text.encode("utf-8", "surrogatepass")) + len(item.metadata)
        if size > max_text_bytes:
            return f"text and metadata of {size} bytes are more than the {max_text_bytes} that an item may have", "text"
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


def read_options(options: dict[str, Any] | None, *, param: str) -> dict[str, Any]:
    """The options of a request, which stand at ``param`` of its body; RequestError for what no model takes."""
    if not options:
        return {}
    check_free_form(options, param=param)
    check_keep_alive(options, param=param)
    if not isinstance(options.get("is_query", False), bool):
        raise RequestError("is_query is true or false", param=f"{param}.is_query")
    return options
