"""What the operator sees: one line a fact, coloured on a terminal, plain elsewhere."""

from rich.console import Console
from rich.text import Text


class Screen:
    """Owns the terminal."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(highlight=False, soft_wrap=True, stderr=True)

    def say(self, line: str = "", *, style: str = "") -> None:
        """One line."""
        self._out.print(Text(line, style=style))

    def doing(self, what: str) -> None:
        """A step has begun that takes a while."""
        self._out.print(Text(f"  ... {what}", style="dim"))

    def done(self, what: str, seconds: float) -> None:
        """A step has ended well."""
        self._out.print(Text.assemble(("  ok  ", "green"), what, (f"  {seconds:.1f} s", "dim")))

    def trouble(self, line: str) -> None:
        """Something that the farm deals with by itself."""
        self._out.print(Text(line, style="yellow"))

    def failed(self, line: str) -> None:
        """Why the command ends."""
        self._err.print(Text.assemble(("error: ", "bold red"), line))

    def aside(self, line: str) -> None:
        """Detail under a failure."""
        self._err.print(Text(f"  {line}", style="dim"))
