"""``python -m bench [--quick] [NAME...]``: measure, print a table, merge into ``bench/out/latest.json``."""

import json
import signal
import sys
from argparse import ArgumentParser
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import config, fairness, figures, residency
from bench.adapters import adapters8_ratio
from bench.apply import apply1000_s
from bench.drain import drain_msgs_per_s
from bench.figures import Effort, Figure, Measured, spread

OUT = Path(__file__).resolve().parent / "out" / "latest.json"
FIGURES: dict[str, tuple[Figure, float | None, float | None]] = {
    "list32_ratio": (figures.list32_ratio, 0.85, 0.95),
    "single64_ratio": (figures.single64_ratio, 0.50, 0.65),
    "single64_fp32_ratio": (figures.single64_fp32_ratio, 0.75, 0.85),
    "mixed32_ratio": (figures.mixed32_ratio, 0.80, 0.95),
    "busy_core_ratio": (figures.busy_core_ratio, 0.5, 0.65),
    "cpu_ms_per_request": (figures.cpu_ms_per_request, 0.8, 0.5),
    "overhead_ms_p50": (figures.overhead_ms_p50, 3.0, 1.5),
    "drain_msgs_per_s": (drain_msgs_per_s, 8000, 12000),
    "evict12_ratio": (figures.evict12_ratio, 0.8, 0.95),
    "host_reload_ms": (residency.host_reload_ms, 8, 5),
    "disk_reload_ms": (residency.disk_reload_ms, 50, 25),
    "zipf200_ratio": (residency.zipf200_ratio, 0.8, 0.95),
    "swap_share": (residency.swap_share, 0.15, 0.05),
    "leak_pct": (residency.leak_pct, 2, 1),
    "mem_per_model_mb": (residency.mem_per_model_mb, 45, 40),
    "host_idle_mb": (residency.host_idle_mb, 450, 350),
    "load_beside_p99_ratio": (residency.load_beside_p99_ratio, 1.3, 1.1),
    "mixed_ratio": (figures.mixed32_ratio, 0.85, 0.95),
    "start_s": (figures.start_s, 15, 8),
    "farm_idle_mb": (figures.farm_idle_mb, 1600, 1100),
    "growth": (figures.growth, None, None),
    "epoch_poll_cpu_ms": (config.epoch_poll_cpu_ms, 1.0, 0.3),
    "delta_p99_ms": (config.delta_p99_ms, 200, 100),
    "delta_unheard_p99_ms": (config.delta_unheard_p99_ms, config.POLL_S * 1e3, config.POLL_S * 500),
    "resolve_us": (config.resolve_us, 20, 1),
    "apply1000_s": (apply1000_s, 10, 3),
    "adapters8_ratio": (adapters8_ratio, 0.6, 0.8),
    "overload_in_deadline_pct": (fairness.overload_in_deadline_pct, 99, 99.9),
    "overload_goodput_ratio": (fairness.overload_goodput_ratio, 0.9, 0.95),
    "expired_work_pct": (fairness.expired_work_pct, 1, 0.2),
    "neighbour_p99_ratio": (fairness.neighbour_p99_ratio, 1.2, 1.05),
    "auth_ms": (fairness.auth_ms, 0.15, 0.05),
    "openai_over_native": (fairness.openai_over_native, 1.1, 1.03),
}
"""Name, function, what is to be reached, and what would delight; the better direction is the stretch's."""


def main(words: list[str]) -> int:
    """Measure the named figures, or all. SIGTERM ends it as Ctrl-C does: no farm is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = ArgumentParser("python -m bench", description=f"Figures: {', '.join(FIGURES)}.")
    parser.add_argument("--quick", action="store_true", help="two rounds of two seconds, not five of five")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a figure; none: all of them")
    asked = parser.parse_args(words)
    unknown = [name for name in asked.names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    effort = Effort(rounds=2, seconds=2.0) if asked.quick else Effort(rounds=5, seconds=5.0)
    wanted = asked.names or list(FIGURES)
    console = Console(width=160)
    for name in wanted:
        function, reach, stretch = FIGURES[name]
        with console.status(f"{name} ..."):
            measured = function(effort)
        merge(name, measured, reach, stretch)
        console.print(line(name, measured, reach, stretch))
        for note in measured.notes:
            console.print(f"    {note}", style="dim")
    console.print(table(wanted))
    return 0


def merge(name: str, measured: Measured, reach: float | None, stretch: float | None) -> None:
    """Write one figure over its former value."""
    known = read()
    known[name] = {
        "value": round(median(measured.samples), 4),
        "reach": reach,
        "stretch": stretch,
        "spread": round(spread(measured.samples), 4),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": measured.notes,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(known, indent=2) + "\n")


def read() -> dict[str, Any]:
    """The figures measured so far."""
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    return found


def line(name: str, measured: Measured, reach: float | None, stretch: float | None) -> str:
    """One figure as a line."""
    verdict = _verdict(median(measured.samples), reach, stretch)
    return f"[bold]{name}[/] {median(measured.samples):.4g} ±{spread(measured.samples):.0%}  {verdict}"


def table(names: list[str]) -> Table:
    """The figures as a table."""
    made = Table("figure", "median", "spread", "reach", "stretch", "")
    known = read()
    for name in names:
        row = known[name]
        made.add_row(
            name,
            f"{row['value']:.4g}",
            f"{row['spread']:.0%}",
            _shown(row["reach"]),
            _shown(row["stretch"]),
            _verdict(row["value"], row["reach"], row["stretch"]),
        )
    return made


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _verdict(value: float, reach: float | None, stretch: float | None) -> str:
    if reach is None or stretch is None:
        return ""
    sign = 1 if stretch >= reach else -1
    if sign * value >= sign * stretch:
        return "stretch"
    return "reached" if sign * value >= sign * reach else "falls short"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
