"""What a request is told whose deadline has passed: that its model was still loading, or that it had to wait too long.

Loading goes on either way, so whoever asks again later finds the model there.
"""

from typing import Final

from common.errors import DeadlineExceededError, FarmError, ModelLoadingError
from workers.intake import Held

MODEL_RETRY_AFTER_S: Final = 5.0


def late_error(held: Held, *, is_loaded: bool) -> FarmError:
    """The error; ``is_loaded``: the model is on a device of this worker."""
    was_late = held.deadline <= held.arrived  # no load here is to blame
    if is_loaded or was_late:
        return DeadlineExceededError("the request could not be served before its deadline")
    message = f"model {held.ticket.model!r} is still being loaded; ask again soon"
    return ModelLoadingError(message, retry_after_s=MODEL_RETRY_AFTER_S)
