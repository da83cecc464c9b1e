"""Fault points for the chaos tests: a process kills itself with SIGKILL at a named step.

Armed only by ``FARMHAND_FAULT=<point>``; otherwise ``fault`` is a comparison with an empty string.
"""

import os
import signal

_armed = ""


def arm(point: str) -> None:
    """Name the point at which this process shall die; empty disarms."""
    global _armed
    _armed = point


def fault(point: str) -> None:
    """Die here, as if the machine had lost power, if ``point`` is the armed one."""
    if _armed and _armed == point:
        os.kill(os.getpid(), signal.SIGKILL)
