"""The logs of the children: bounded in size, and asked for the one line that says why a child ended."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

LIMIT_BYTES: Final = 8 * 2**20
"""A log and its one predecessor take at most this much each."""
_READ_BYTES: Final = 64 * 2**10
_TELLING: Final = ("PANIC:", "FATAL:", "initdb: error:")


def keep_small(log: Path) -> None:
    """Move the content aside once it is too long. Children append, so they go on in the emptied file."""
    if log.exists() and log.stat().st_size > LIMIT_BYTES:
        shutil.copyfile(log, log.with_suffix(".log.1"))
        with log.open("r+b") as file:
            file.truncate()


def tail(log: Path, start: int) -> list[str]:
    """The last lines written since the log was ``start`` bytes long."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        if start > size:  # it was emptied since
            start = 0
        file.seek(max(start, size - _READ_BYTES))
        return [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def cause(log: Path, start: int) -> str:
    """The line that says best why the child ended that wrote these lines; names the log where that takes more."""
    lines = tail(log, start)
    for line in reversed(lines):
        said = _event(line)
        if "reason" in said:
            return str(said["reason"])
    for at, line in enumerate(lines):
        for word in _TELLING:
            if word in line:
                detail = lines[at + 1].partition("DETAIL:")[2].strip() if at + 1 < len(lines) else ""
                return f"{line.partition(word)[2].strip()}{f' ({detail})' if detail else ''}"
    last = lines[-1] if lines else "it said nothing"
    return f"{_event(last).get('event', last)} (more in {log})"


def _event(line: str) -> dict[str, Any]:
    """A line of our own logs; nothing if it is none."""
    if not line.startswith("{"):
        return {}
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
