"""Headers and parameters of queries that more than one view heeds or answers with."""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from common.errors import (
    ConfigError,
    ConfigUnavailableError,
    DocumentError,
    EpochConflictError,
    IdempotencyError,
    ModelNotFoundError,
)
from tasks.names import Lane
from webapp import placement, routing
from webapp.openapi.declared import Parameter
from webapp.wire.headers import ERROR_CODE, REQUEST_ID, SERVER_VERSION

Milliseconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
EPOCH: Final = Annotated[int, Meta(ge=0, lt=2**62)]

EVERYWHERE: Final = (
    Parameter(name=SERVER_VERSION, meaning="The version of this contract that the farm speaks."),
    Parameter(name=REQUEST_ID, meaning="The caller's `X-Request-Id`, else one of the farm's."),
)
"""What every answer carries."""
POOL: Final = Parameter(name=placement.POOL_HEADER, meaning="The pool whose workers shall serve this.")
PROFILE: Final = Parameter(name=placement.PROFILE_HEADER, meaning="The machine profile that shall serve this.")
LANE: Final = Parameter(
    name=routing.LANE_HEADER, kind=Lane, meaning="The lane to queue in; no higher than the class of the key."
)
PRIORITY: Final = Parameter(
    name=routing.PRIORITY_HEADER, kind=Lane, meaning=f"The same as `{routing.LANE_HEADER}`, and goes before it."
)
TIMEOUT: Final = Parameter(
    name=routing.TIMEOUT_HEADER,
    kind=Annotated[float, Meta(gt=0, le=routing.MAX_TIMEOUT_S)],
    meaning="Seconds until the deadline; unless given, the model's or the farm's.",
)
DEADLINE: Final = Parameter(
    name=routing.DEADLINE_HEADER,
    kind=Annotated[float, Meta(gt=0, le=routing.MAX_TIMEOUT_S * 1000)],
    meaning=f"The same as `{routing.TIMEOUT_HEADER}` in milliseconds, and goes before it.",
)
IDEMPOTENCY_KEY: Final = Parameter(
    name="Idempotency-Key",
    kind=Annotated[str, Meta(pattern="^[!-~]{1,255}$")],
    meaning="The same request again under the same key is done once and answered alike, for a day.",
)
INFERS: Final = (POOL, PROFILE, LANE, PRIORITY, TIMEOUT, DEADLINE, IDEMPOTENCY_KEY)
"""What every inference route heeds."""

PREFER: Final = Parameter(name="Prefer", meaning="`respond-async`: queue it, and answer 202 with the id of a task.")
MODE: Final = Parameter(
    name="mode", place="query", kind=Literal["sync", "async"], meaning="`async` is the same as `Prefer: respond-async`."
)
WAIT: Final = Parameter(name="wait", place="query", kind=Count, meaning="Whole seconds to wait for it, at most 60.")

WRITE_ERRORS: Final = (
    ConfigError,
    DocumentError,
    EpochConflictError,
    IdempotencyError,
    ModelNotFoundError,
    ConfigUnavailableError,
)
IF_MATCH: Final = Parameter(
    name="If-Match", meaning="The epoch that this write is meant for, as the `ETag` of an answer names it; or `*`."
)
ACTOR: Final = Parameter(
    name="X-Farmhand-Actor",
    kind=Annotated[str, Meta(max_length=100)],
    meaning="Who writes, for the history, where callers need no key.",
)
REASON: Final = Parameter(
    name="X-Farmhand-Reason", kind=Annotated[str, Meta(max_length=500)], meaning="Why, for the history."
)
WRITES: Final = (IF_MATCH, IDEMPOTENCY_KEY, ACTOR, REASON)
"""What every write of the config DB heeds."""

CODE: Final = Parameter(name=ERROR_CODE, meaning="The code of the error, as in the body.")
RETRY_AFTER: Final = Parameter(name="Retry-After", kind=Count, meaning="Seconds after which trying again makes sense.")
WWW_AUTHENTICATE: Final = Parameter(name="WWW-Authenticate", meaning="How to say who calls.")


def referred(headers: Iterable[Parameter]) -> dict[str, Any]:
    """Headers of an answer, by their places among the components."""
    return {one.name: {"$ref": f"#/components/headers/{one.name}"} for one in headers}


def an_epoch(name: str, meaning: str, **rest: Any) -> Parameter:
    """A parameter of the query that names an epoch."""
    return Parameter(name=name, meaning=meaning, kind=EPOCH, place="query", **rest)


ETAG: Final = Parameter(name="ETag", meaning='The epoch of what is answered, as `"17"`.')
REPLAYED: Final = Parameter(name="Idempotency-Replayed", meaning="`true`: this is the answer to an earlier request.")
TIMES: Final = tuple(
    Parameter(name=f"X-{what}-Time", kind=Milliseconds, meaning=f"Milliseconds {spent}.")
    for what, spent in (
        ("Queue", "in the queue"),
        ("Tokenization", "of tokenising"),
        ("Inference", "of computing"),
        ("Postprocessing", "of making results"),
        ("Total", "in all"),
    )
)
MEASURED: Final = (
    *TIMES,
    REPLAYED,
    Parameter(name="X-SIE-Model-Revision", meaning="The digest of the spec that answered."),
    Parameter(name="X-SIE-Units-Input-Tokens", kind=Count, meaning="Tokens that the model has read."),
    Parameter(name="X-SIE-Units-Images", kind=Count, meaning="Images that the model has seen."),
    Parameter(name="X-SIE-Units-Pairs", kind=Count, meaning="Pairs that the model has scored."),
)
"""What an answer to an inference request tells of it."""
LOCATION: Final = Parameter(name="Location", meaning="Where to ask for the outcome.")
PREFERENCE_APPLIED: Final = Parameter(name="Preference-Applied", meaning="`respond-async`")
