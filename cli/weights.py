"""The process that knows weights, as the command line starts it, and the bar that shows what it fetches.

The command line imports no worker: it speaks to ``workers.weights.main`` in JSON, one object a line.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from common.errors import SetupError


def ask(word: str, asked: Any) -> Iterator[dict[str, Any]]:
    """What it tells, as it comes; SetupError if it cannot do it at all."""
    command = [sys.executable, "-m", "workers.weights.main", word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None  # asked for
        assert process.stdout is not None  # asked for
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        for line in process.stdout:
            told = json.loads(line)
            if told["event"] == "failed" and told["name"] is None:
                raise SetupError(told["error"]["message"])
            yield told
    if process.returncode not in (0, 1):
        raise SetupError(f"`{' '.join(command[1:])}` ended with status {process.returncode}")


class Transfer:
    """A bar with the rate for each model, on a terminal; elsewhere nothing. As a block."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def show(self, name: str, here: int, total: int) -> None:
        """So many bytes of a model are here."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name)
        self._progress.update(self._bars[name], completed=here, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
