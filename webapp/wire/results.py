"""What the inference and task routes answer with, as types: for the document of the API, and for who reads the code.

Arrays of numbers are lists in JSON; in msgpack they are maps (``tasks.codec``). Results are written as the host packed
them, so these types are held to the answers by tests, not by a checker of types.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from tasks.names import Operation
from tasks.scores import Score

OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
TaskState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class ErrorBody(TypedDict):
    """What went wrong. Some codes bring further fields."""

    code: str
    message: str
    param: NotRequired[str]


class Problem(TypedDict):
    """An error."""

    error: ErrorBody


class Dense(TypedDict):
    """One vector; ``dims`` is its width before it was packed into bits."""

    dims: int
    dtype: OutputDtype
    values: list[float]


class Sparse(TypedDict):
    """One sparse vector: weights by the ids of tokens."""

    dims: int | None
    dtype: OutputDtype
    indices: list[int]
    values: list[float]


class Multivector(TypedDict):
    """One vector for each token."""

    token_dims: int
    num_tokens: int
    dtype: OutputDtype
    values: list[list[float]]


class Encoded(TypedDict):
    """One item's vectors, and its id if it has one."""

    id: NotRequired[str]
    dense: NotRequired[Dense]
    sparse: NotRequired[Sparse]
    multivector: NotRequired[Multivector]


class Entity(TypedDict):
    """A span of the text: ``text[start:end]``, in characters."""

    text: str
    label: str
    score: float
    start: int | None
    end: int | None
    bbox: NotRequired[list[float] | None]


class Relation(TypedDict):
    """What holds between two spans."""

    head: str
    tail: str
    relation: str
    score: float


class Classification(TypedDict):
    """A class of the text."""

    label: str
    score: float


class ItemError(TypedDict):
    """Why one item could not be served."""

    code: str
    message: str


class Extracted(TypedDict):
    """What one item holds; an item that could not be served has an ``error`` instead."""

    id: str
    entities: list[Entity]
    relations: list[Relation]
    classifications: list[Classification]
    objects: list[Any]
    data: Any
    error: NotRequired[ItemError]


class Timing(TypedDict):
    """Milliseconds spent."""

    queue_ms: NotRequired[float]
    tokenization_ms: NotRequired[float]
    inference_ms: NotRequired[float]
    postprocessing_ms: NotRequired[float]
    total_ms: NotRequired[float]


class Usage(TypedDict):
    """What was measured."""

    input_tokens: NotRequired[int]
    images: NotRequired[int]
    pairs: NotRequired[int]


class EncodeAnswer(TypedDict):
    """One result for each item, in order."""

    model: str
    items: list[Encoded]
    timing: Timing
    usage: NotRequired[Usage]


class ScoreAnswer(TypedDict):
    """The items, best first."""

    model: str
    query_id: str | None
    scores: list[Score]
    timing: Timing
    usage: NotRequired[Usage]


class ExtractAnswer(TypedDict):
    """One result for each item, in order."""

    model: str
    items: list[Extracted]
    timing: Timing
    usage: NotRequired[Usage]


_OF_THE_OPERATION = Meta(
    description="What the operation answers.",
    extra_json_schema={
        "anyOf": [
            {"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (EncodeAnswer, ScoreAnswer, ExtractAnswer)
        ]
    },
)
"""Written out, because a union of mappings cannot be told apart by who parses."""


class Accepted(TypedDict):
    """A task that was queued."""

    task_id: str
    state: Literal["queued"]


class Task(TypedDict):
    """What has become of a task: once it has succeeded its ``result``, else an ``error``."""

    task_id: str
    state: TaskState
    model: str
    operation: Operation
    submitted: str
    result: NotRequired[Annotated[Any, _OF_THE_OPERATION]]
    error: NotRequired[ErrorBody]


class NotReady(TypedDict):
    """Why a farm cannot serve now."""

    status: Literal["not_ready"]
    reasons: list[str]
    error: ErrorBody
