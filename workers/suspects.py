"""Finding the request that kills hosts: a micro-batch that was running when its host died runs again in halves."""

from collections.abc import Mapping, Sequence
from typing import Final

from common.errors import HostLostError
from workers.joining import Slice
from workers.scheduler import Scheduler
from workers.settling import Settler
from workers.work import Work

CRASHES_ALONE_UNTIL_FAILED: Final = 2


class Suspects:
    """What is suspected runs again, apart from everything else.

    Args:
        scheduler: is given the halves.
        settler: answers the culprit.
    """

    def __init__(self, scheduler: Scheduler, settler: Settler) -> None:
        self._scheduler = scheduler
        self._settler = settler

    def run_again(self, works: Sequence[Work], slices: Mapping[int, Slice], reason: str) -> None:
        """Run a suspect batch in halves; a work that kills a host alone, twice, is the culprit, and fails."""
        if len(works) > 1:
            middle = (len(works) + 1) // 2
            self._scheduler.add_together(works[:middle])
            self._scheduler.add_together(works[middle:])
            return
        for work in works:
            held = slices[work.id].held
            held.crashes += 1
            if held.crashes < CRASHES_ALONE_UNTIL_FAILED:
                self._scheduler.add_together([work])
            else:
                error = HostLostError(f"the model process died while running this request alone ({reason})")
                self._settler.fail(held, error)
