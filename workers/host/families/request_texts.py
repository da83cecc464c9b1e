"""Reads the texts of a micro-batch: which text of which request stands where, and which request is at fault. No torch.

A request to encode has its items; one to score has its query first, then its items. What is wrong with a request is its
own error: the others of the micro-batch are served.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from common.errors import FarmError, InferenceError, RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families import results
from workers.host.families.dense_folder import Folder
from workers.host.families.dense_prompts import wording

Words: TypeAlias = Callable[[Request], Callable[[str], str]]
"""How the texts of a request are worded; its ``options.is_query`` says which kind they are."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text, worded. ``is_query``: None where the request does not say."""

    text: str
    is_query: bool | None


@dataclass(frozen=True, slots=True)
class Part:
    """The texts of one request: where they stand in the micro-batch, or the error that answers them."""

    request: Request
    rows: slice
    outputs: tuple[str, ...] = ()
    error: FarmError | None = None


def read_parts(
    operation: str,
    requests: Sequence[Request],
    *,
    check: Callable[[Request], tuple[str, ...]],
    words: Words,
) -> tuple[list[Part], list[Text]]:
    """Each request's part, and all texts of the micro-batch, in order.

    Args:
        operation: ``encode`` or ``score``.
        requests: the micro-batch.
        check: the outputs a request is answered with; RequestError if the model cannot.
        words: how its texts are worded.
    """
    texts: list[Text] = []
    parts: list[Part] = []
    for request in requests:
        start = len(texts)
        try:
            outputs = check(request)
            texts += _texts(operation, request, words)
            parts.append(Part(request, slice(start, len(texts)), outputs))
        except RequestError as error:
            parts.append(Part(request, slice(start, start), error=_placed(error, operation)))
    return parts, texts


def folder_words(spec: ModelSpec, folder: Folder) -> Words:
    """Templates, instructions and prompts as the spec and the folder have them."""

    def words(request: Request) -> Callable[[str], str]:
        word = wording(request, spec, folder)
        return (lambda text: word(text).lower()) if folder.lower_case else word

    return words


def wanted_outputs(request: Request, spec: ModelSpec) -> tuple[str, ...]:
    """What a request asks for; a model of several outputs gives its dense vector where nothing is asked.

    Raises:
        RequestError: the model has no such output.
    """
    unknown = [one for one in request.output_types or () if one not in spec.outputs]
    if unknown:
        raise RequestError(
            f"{spec.id} has no output {unknown[0]!r}; it has {', '.join(spec.outputs)}", param="params.output_types"
        )
    if request.output_types:
        return tuple(request.output_types)
    return ("dense",) if "dense" in spec.outputs else spec.outputs


def check_operation(operation: str, spec: ModelSpec, served: Sequence[str]) -> None:
    """RequestError for an operation that is none of the family's."""
    if operation not in served:
        raise RequestError(f"{spec.id} does not {operation}", param="model")


def check_flags(request: Request, *names: str) -> None:
    """RequestError unless these options are true or false, where they are given."""
    for name in names:
        if not isinstance(request.options.get(name), (bool, type(None))):
            raise RequestError(f"{name} is true or false", param=f"params.options.{name}")


def output_dtype(request: Request) -> str:
    """The dtype a request asks for; RequestError if there is none such."""
    wanted = request.options.get("output_dtype", request.output_dtype)
    results.check_output_dtype(str(wanted))
    return str(wanted)


def not_finite(spec: ModelSpec) -> InferenceError:
    """The error of a request whose numbers are not finite."""
    return InferenceError(f"{spec.id} gave numbers that are not finite for this request")


def _placed(error: RequestError, operation: str) -> RequestError:
    """The error with the field's path in the body of this operation: one to score has its options beside its items."""
    if operation == "score" and error.param is not None:
        error.param = error.param.removeprefix("params.")
    return error


def _texts(operation: str, request: Request, words: Words) -> list[Text]:
    if operation == "encode":
        is_query = request.options.get("is_query")
        return _worded(request, list(request.items), words, is_query, field="items")
    query = _as(request, instruction=request.instruction, is_query=True)
    documents = _as(request, instruction=None, is_query=False)
    return [
        *_worded(query, [request.query], words, True, field="query"),
        *_worded(documents, list(request.items), words, False, field="items"),
    ]


def _as(request: Request, *, instruction: str | None, is_query: bool) -> Request:
    """The request as if it asked for one kind of text only."""
    kept = {name: value for name, value in request.options.items() if is_query or name != "instruction"}
    return msgspec.structs.replace(request, instruction=instruction, options={**kept, "is_query": is_query})


def _worded(request: Request, items: Sequence[Any], words: Words, is_query: bool | None, *, field: str) -> list[Text]:
    word = words(request)
    errors: dict[int, RequestError] = {}
    found: list[Text] = []
    for place, item in enumerate(items):
        text = item.get("text") if isinstance(item, dict) else item
        if isinstance(text, str):
            found.append(Text(word(text), is_query))
        else:
            at = f"{field}[{place}].text" if field == "items" else f"{field}.text"
            errors[place] = RequestError("an item has a text, as a string", param=at)
    if errors:
        raise results.item_errors(errors) if field == "items" else errors[0]
    return found
