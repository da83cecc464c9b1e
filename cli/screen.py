"""What the operator sees: one line a fact, coloured on a terminal, plain elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Screen:
    """Owns the terminal."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(highlight=False, soft_wrap=True, stderr=True)

    def say(self, line: str = "", *, style: str = "") -> None:
        """One line."""
        self._out.print(Text(line, style=style))

    def write(self, text: str) -> None:
        """Text for a file or another program, exactly as it is."""
        self._out.file.write(text)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns under titles on a terminal; elsewhere one line a row, tabs between, for other programs."""
        if not self._out.is_terminal:
            self._out.file.writelines("\t".join(row) + "\n" for row in rows)
            return
        table = Table(*titles, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))
        self._out.print(table)

    def doing(self, what: str) -> None:
        """A step has begun that takes a while."""
        self._out.print(Text(f"  ... {what}", style="dim"))

    def done(self, what: str, seconds: float) -> None:
        """A step has ended well."""
        self._out.print(Text.assemble(("  ok  ", "green"), what, (f"  {seconds:.1f} s", "dim")))

    def trouble(self, line: str) -> None:
        """Something that the farm deals with by itself."""
        self._out.print(Text(line, style="yellow"))

    def warn(self, line: str) -> None:
        """Something that the operator should look at, beside what the command says."""
        self._err.print(Text.assemble(("warning: ", "bold yellow"), line))

    def note(self, line: str) -> None:
        """What a person may want to know besides; no part of what another program reads."""
        self._err.print(Text(line, style="dim"))

    def failed(self, line: str) -> None:
        """Why the command ends."""
        self._err.print(Text.assemble(("error: ", "bold red"), line))
