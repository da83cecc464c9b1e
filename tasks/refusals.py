"""Why a request was not admitted, in words, and when to come back."""

from typing import Final

from common.errors import CapacityError, QueueFullError, RateLimitError, TenantLimitError
from tasks.bounds import Bounds
from tasks.pace import KEPT_SHARE

RETRY_AFTER_S: Final = 2.0
"""When to come back where nothing is known that would say."""
LONGEST_RETRY_S: Final = 300.0


def refusal(
    answer: str, *, queue: str, model: str, tenant: str, bounds: Bounds, timeout_s: float, request_s: float | None
) -> CapacityError:
    """The error for what ``publish.lua`` answered.

    Args:
        answer: its text.
        queue: where the request was to wait.
        model: whom it was for.
        tenant: whose it is.
        bounds: what it was held to.
        timeout_s: its time until its deadline.
        request_s: how long a request of this queue takes the whole farm; None if that is not known.
    """
    reason, _, number = answer.partition(" ")
    match reason:
        case "queue":
            return QueueFullError(
                f"queue {queue} is full; try again soon", retry_after_s=RETRY_AFTER_S, details={"limit": "queue"}
            )
        case "model":
            message = f"model {model!r} has {bounds.model} requests open, as many as it may; try again soon"
            return QueueFullError(message, retry_after_s=_half(bounds.model, request_s), details={"limit": "model"})
        case "tenant":
            message = f"tenant {tenant!r} has {bounds.tenant} requests open, as many as it may; wait for some of them"
            return TenantLimitError(message, retry_after_s=_half(bounds.tenant, request_s), details={"limit": "tenant"})
        case "lane":
            lane = queue.rpartition(".")[2]
            message = (
                f"tenant {tenant!r} has {bounds.lane} requests open in the lane {lane}, as many as it may; "
                "wait for some of them"
            )
            return TenantLimitError(message, retry_after_s=_half(bounds.lane, request_s), details={"limit": "lane"})
        case "tokens":
            message = f"tenant {tenant!r} has used up its {bounds.tokens_per_minute} tokens a minute"
            return RateLimitError(message, retry_after_s=float(number), details={"limit": "tokens_per_minute"})
        case "wait":
            wait_s = float(number)
            message = f"this would take about {wait_s:.1f} s here now, and its deadline is in {timeout_s:.1f} s"
            return QueueFullError(
                message, retry_after_s=_bounded(wait_s - timeout_s * KEPT_SHARE), details={"limit": "wait"}
            )
    message = "Redis has no memory left for further requests; try again soon"
    return QueueFullError(message, retry_after_s=RETRY_AFTER_S, details={"limit": "memory"})


def _half(requests: int, request_s: float | None) -> float:
    """How long half of these take: who comes back then finds room."""
    return RETRY_AFTER_S if request_s is None else _bounded(requests * request_s / 2)


def _bounded(seconds: float) -> float:
    return min(LONGEST_RETRY_S, max(1.0, seconds))
