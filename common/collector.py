"""When Python looks for cyclic garbage: seldom, and never among what a process holds for good.

By default it looks whenever 700 more containers were made than freed, and now and then goes through all there are.
Requests leave few cycles behind, but a process of ours holds some 200 000 containers of its libraries from its start
on: going through them cost the web tier 15 % of its time. What is no cycle is freed at once, as ever.
"""

import gc
from typing import Final

YOUNG: Final = 10_000
"""So many containers more made than freed, and Python looks among them. Hosts keep 700: theirs hold weights."""


def collect_seldom() -> None:
    """For the start of a process: its imports are garbage to nobody."""
    gc.set_threshold(YOUNG, 10, 10)


def keep_for_good() -> None:
    """For the end of a start: what is there now is not looked at again, garbage or not; imports leave next to none."""
    gc.freeze()
