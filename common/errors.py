"""The one error tree. Codes are public: clients branch on them and they cross the queue.

FarmError                      INTERNAL_ERROR
+- RequestError                INVALID_INPUT          the caller's fault; ``param`` names the field
|  +- NotFoundError            NOT_FOUND
|  |  +- ModelNotFoundError    MODEL_NOT_FOUND
|  |  +- TaskNotFoundError     TASK_NOT_FOUND
|  +- MethodNotAllowedError    METHOD_NOT_ALLOWED
|  +- UnauthenticatedError     UNAUTHENTICATED        no key, or one that is not valid
|  +- ForbiddenError           FORBIDDEN              the key is valid, but not for this
|  +- MediaTypeError           UNSUPPORTED_MEDIA_TYPE
|  +- InputTooLongError        INPUT_TOO_LONG         one input is longer than the model takes
|  +- BodyTooLargeError        INPUT_TOO_LONG         the whole body is over the limit
|  +- BodyTimeoutError         REQUEST_TIMEOUT        the body came too slowly
|  +- ConfigError              INVALID_CONFIG         a document is no valid config; ``param`` names its field
|  |  +- DocumentError         INVALID_CONFIG         it cannot even be read as YAML or JSON
|  +- IdempotencyError         IDEMPOTENCY_MISMATCH   the idempotency key was used for something else
|  +- RouteUnsupportedError    NOT_IMPLEMENTED        the protocol has this route, this release does not
|  +- ModelUnsupportedError    MODEL_UNSUPPORTED      the model is known, but this release has no code that runs it
+- CapacityError               RESOURCE_EXHAUSTED     try again after ``retry_after_s``
|  +- QueueFullError           QUEUE_FULL             ``details["limit"]`` says which one is reached
|  |  +- TenantLimitError      QUEUE_FULL             the tenant's own: others are still served
|  +- RateLimitError           RATE_LIMIT             the tenant has used up its tokens of the minute
|  +- ResidencyFullError       RESOURCE_EXHAUSTED     every resident model is leased, or the model cannot fit
|  +- ModelLoadingError        MODEL_LOADING          the deadline would pass before the model is loaded
|  +- ProvisioningError        PROVISIONING           no worker lives where the request goes
|  +- AdapterLoadingError      LORA_LOADING           the deadline passed before the adapter was there
|  +- QueueUnavailableError    QUEUE_UNAVAILABLE      Redis does not answer
|  +- ConfigUnavailableError   CONFIG_UNAVAILABLE     Postgres does not answer
|  +- AuthUnavailableError     AUTH_UNAVAILABLE       the issuer of tokens does not answer
|  +- ObjectStoreError         OBJECT_STORE_UNAVAILABLE  the object store does not answer, or refuses
+- ModelLoadError              MODEL_LOAD_FAILED      the model cannot be loaded; ``details`` say why
+- InferenceError              INFERENCE_ERROR        the model failed on this request
+- WorkerLostError             WORKER_LOST            workers died with this request running
+- DeadlineExceededError       DEADLINE_EXCEEDED
+- CancelledError              CANCELLED
+- EpochConflictError          EPOCH_CONFLICT
+- ContentConflictError        CONTENT_CONFLICT       what was to be added is there already, and differs
+- MessageError                MESSAGE_REFUSED        a queue message that is not ours or is damaged
+- HostLostError               INFERENCE_ERROR        the model process died (segfault, kill, hang)
+- SetupError                  SETUP_FAILED           the farm cannot start; one clear line for the operator
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class FarmError(Exception):
    """An error with a public code.

    Args:
        message: what happened, to which thing, and what to try.
        param: path of the offending field in the request, as ``items[3].text``.
        details: further public fields, JSON-able scalars and lists.
        retry_after_s: seconds after which trying again makes sense.
    """

    code: ClassVar[str] = "INTERNAL_ERROR"

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s

    def as_dict(self) -> dict[str, Any]:
        """The form that crosses the queue and, under ``error``, the wire."""
        body: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.param is not None:
            body["param"] = self.param
        if self.retry_after_s is not None:
            body["retry_after_s"] = self.retry_after_s
        return {**self.details, **body}


class RequestError(FarmError):
    """The request cannot be served as it stands."""

    code = "INVALID_INPUT"


class NotFoundError(RequestError):
    """Nothing is served under this name."""

    code = "NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    """No model of this name in the config DB; ``details["nearest"]`` lists similar ids."""

    code = "MODEL_NOT_FOUND"


class TaskNotFoundError(NotFoundError):
    """No record of this task: never submitted, or its result has expired."""

    code = "TASK_NOT_FOUND"


class MethodNotAllowedError(RequestError):
    """The route exists, the method does not."""

    code = "METHOD_NOT_ALLOWED"


class UnauthenticatedError(RequestError):
    """Nobody knows who calls: no key, or one that is unknown, expired or revoked."""

    code = "UNAUTHENTICATED"


class ForbiddenError(RequestError):
    """The caller is known and may not do this."""

    code = "FORBIDDEN"


class MediaTypeError(RequestError):
    """The body is neither JSON nor msgpack, or it is compressed."""

    code = "UNSUPPORTED_MEDIA_TYPE"


class InputTooLongError(RequestError):
    """One input is longer than the model or the farm takes."""

    code = "INPUT_TOO_LONG"


class BodyTooLargeError(InputTooLongError):
    """The whole request body is over the limit."""


class BodyTimeoutError(RequestError):
    """The request body came too slowly."""

    code = "REQUEST_TIMEOUT"


class ConfigError(RequestError):
    """A document that is no valid config."""

    code = "INVALID_CONFIG"


class DocumentError(ConfigError):
    """A document that cannot be read as YAML or JSON, or not safely."""


class IdempotencyError(RequestError):
    """The idempotency key was used for another request before."""

    code = "IDEMPOTENCY_MISMATCH"


class ModelUnsupportedError(RequestError):
    """The model is known and cannot be served; the message says why."""

    code = "MODEL_UNSUPPORTED"


class RouteUnsupportedError(RequestError):
    """A route that its protocol has and this farm does not."""

    code = "NOT_IMPLEMENTED"


class CapacityError(FarmError):
    """The farm cannot take this now; a later try may succeed."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str = "", *, retry_after_s: float = 1.0, **rest: Any) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **rest)


class QueueFullError(CapacityError):
    """No further request is taken now; ``details["limit"]``: queue, model, tenant, lane, wait or memory."""

    code = "QUEUE_FULL"


class TenantLimitError(QueueFullError):
    """The tenant has as many requests open as it may; others are still served."""


class RateLimitError(CapacityError):
    """The tenant has used up its tokens of the minute."""

    code = "RATE_LIMIT"


class ResidencyFullError(CapacityError):
    """Every resident model is leased, or the model is larger than the device budget."""

    code = "RESOURCE_EXHAUSTED"


class ModelLoadingError(CapacityError):
    """The deadline would pass before the model is loaded."""

    code = "MODEL_LOADING"


class ProvisioningError(CapacityError):
    """No worker lives where the request goes; the demand is recorded. ``details["estimated_wait_s"]`` is a guess."""

    code = "PROVISIONING"


class AdapterLoadingError(CapacityError):
    """The deadline passed before the adapter was there; its loading goes on."""

    code = "LORA_LOADING"


class QueueUnavailableError(CapacityError):
    """Redis does not answer."""

    code = "QUEUE_UNAVAILABLE"


class ConfigUnavailableError(CapacityError):
    """Postgres does not answer."""

    code = "CONFIG_UNAVAILABLE"


class AuthUnavailableError(CapacityError):
    """The issuer of tokens does not answer."""

    code = "AUTH_UNAVAILABLE"


class ObjectStoreError(CapacityError):
    """The object store, through which large bodies and results travel, does not answer or refuses."""

    code = "OBJECT_STORE_UNAVAILABLE"


class ModelLoadError(FarmError):
    """The model cannot be loaded.

    ``details``: ``error_class`` (GATED NOT_FOUND DEPENDENCY CONFIG OOM NETWORK STORAGE ENGINE TIMEOUT UNKNOWN),
    ``permanent`` (trying again without a change is pointless) and ``attempts``; where known ``remedy`` (what to do) and
    ``tried`` (the places its weights were looked for).
    """

    code = "MODEL_LOAD_FAILED"


class InferenceError(FarmError):
    """The model failed on this request."""

    code = "INFERENCE_ERROR"


class WorkerLostError(FarmError):
    """Three workers died with this request running; it is kept in the dead letters."""

    code = "WORKER_LOST"


class DeadlineExceededError(FarmError):
    """The request's deadline passed before it was served."""

    code = "DEADLINE_EXCEEDED"


class CancelledError(FarmError):
    """The caller, or an operator, cancelled the task."""

    code = "CANCELLED"


class EpochConflictError(FarmError):
    """The config DB is not at the epoch the writer expected."""

    code = "EPOCH_CONFLICT"


class ContentConflictError(FarmError):
    """What was to be added is there already with other content; ``details["differences"]`` says where."""

    code = "CONTENT_CONFLICT"


class MessageError(FarmError):
    """A queue message that is damaged, or claims to be ours and is not."""

    code = "MESSAGE_REFUSED"


class HostLostError(InferenceError):
    """The model process died while this request ran."""


class SetupError(FarmError):
    """The farm cannot start; the message is the one line the operator sees."""

    code = "SETUP_FAILED"


def _codes() -> dict[str, type[FarmError]]:
    """Each code's nearest class to the root: the one that a received code is turned back into."""
    found: dict[str, type[FarmError]] = {}
    waiting: list[type[FarmError]] = [FarmError]
    while waiting:
        kind = waiting.pop(0)
        found.setdefault(kind.code, kind)
        waiting.extend(kind.__subclasses__())
    return found


def error_from_dict(body: Mapping[str, Any]) -> FarmError:
    """Rebuild an error that crossed the queue; an unknown code (a newer release's) becomes a plain FarmError."""
    rest = dict(body)
    kind = _codes().get(rest.pop("code", ""), FarmError)
    retry_after_s = rest.pop("retry_after_s", None)
    known: dict[str, Any] = {"param": rest.pop("param", None)}
    if retry_after_s is not None:
        known["retry_after_s"] = retry_after_s
    return kind(rest.pop("message", ""), details=rest, **known)
