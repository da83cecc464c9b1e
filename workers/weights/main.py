"""What an operator does with weights, as a process of its own: ``python -m workers.weights.main <word>``.

``farmhand models`` starts it, since the command line imports no worker. It reads one JSON document on its standard
input and writes one JSON object a line: progress, and what became of each.

- ``prefetch``: ``[{"name", "source", "formats"}]`` -> ``progress``, then ``done`` or ``failed`` of each;
- ``cache``: ``{}`` -> one ``entry`` each;
- ``prune``: ``{"names", "all", "keep_bytes"}`` -> one ``removed`` or ``kept`` each.
"""

import json
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

import msgspec

from common.errors import FarmError
from common.logs import configure_logs
from common.settings import WorkerSettings, load_settings
from config_db.spec import Source, WeightsFormat
from workers.weights.manifest import SAFE
from workers.weights.resolve import resolve, tiers_of
from workers.weights.setup import WeightsSetup, weights_setup
from workers.weights.store import Entry, Store

TELL_S: Final = 0.1
PREFETCH_S: Final = 24 * 3600.0
"""One model may take so long: no request waits for it."""


class Prefetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model to fetch, with weights in formats that its spec trusts."""

    name: str
    source: Source
    formats: tuple[WeightsFormat, ...] = SAFE


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to leave: these, by source; or all; or as many, least recently used first, as leave so many bytes."""

    names: tuple[str, ...] = ()
    all: bool = False
    keep_bytes: int | None = None


def prefetch(models: Sequence[Prefetch], setup: WeightsSetup) -> bool:
    """Fetch each to this machine, and to the bucket; whether all are here."""
    setup = msgspec.structs.replace(setup, timeout_s=PREFETCH_S)
    fetched = [_prefetch(model, setup) for model in models]  # all of them, whatever becomes of the first
    return all(fetched)


def _prefetch(model: Prefetch, setup: WeightsSetup) -> bool:
    told_at = 0.0

    def on_progress(here: int, total: int) -> None:
        nonlocal told_at
        if monotonic() - told_at >= TELL_S or here == total:
            told_at = monotonic()
            _tell(event="progress", name=model.name, bytes=here, total=total)

    try:
        with resolve(model.source, setup, formats=model.formats, on_progress=on_progress) as files:
            if model.source.path is None:
                tiers_of(setup).wait_written_back()
            size = sum(path.stat().st_size for path in files.path.rglob("*") if path.is_file())
            _tell(event="done", name=model.name, path=str(files.path), bytes=size)
    except FarmError as error:
        _tell(event="failed", name=model.name, error=error.as_dict())
        return False
    return True


def cache(store: Store) -> bool:
    """List what lies in the store."""
    for entry in store.entries():
        _tell(event="entry", **_described(store, entry))
    return True


def prune(wanted: Prune, store: Store) -> bool:
    """Remove what is asked for and not in use; whether all of it is gone."""
    entries = store.entries()
    if wanted.names or wanted.all:
        chosen = [entry for entry in entries if wanted.all or entry.manifest.source in wanted.names]
    else:
        chosen = _above(entries, wanted.keep_bytes, store)
    unknown = set(wanted.names) - {entry.manifest.source for entry in entries}
    for name in sorted(unknown):
        _tell(event="unknown", source=name)
    if wanted.all:
        store.sweep()
    removed = [store.remove(entry.place) for entry in chosen]
    for entry, is_gone in zip(chosen, removed, strict=True):
        _tell(event="removed" if is_gone else "kept", **_described(store, entry))
    return all(removed) and not unknown


def _above(entries: Sequence[Entry], keep_bytes: int | None, store: Store) -> list[Entry]:
    """The least recently used that are in the way of keeping so few bytes, or of the store's own bounds."""
    excess = store.excess_bytes(0) if keep_bytes is None else sum(entry.bytes for entry in entries) - keep_bytes
    chosen = []
    for entry in entries:
        if excess > 0 and not entry.in_use:
            chosen.append(entry)
            excess -= entry.bytes
    return chosen


def _described(store: Store, entry: Entry) -> dict[str, Any]:
    return {
        "source": entry.manifest.source,
        "bytes": entry.bytes,
        "used_at": entry.used_at,
        "in_use": entry.in_use,
        "owed": store.owes(entry.place),
        "path": str(store.directory / entry.place),
    }


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(word: str) -> bool:
    """Do what is asked for on standard input."""
    settings = load_settings(WorkerSettings)
    configure_logs(level="WARNING")
    setup, asked = weights_setup(settings), sys.stdin.buffer.read()
    if word == "prefetch":
        return prefetch(msgspec.json.decode(asked, type=list[Prefetch]), setup)
    store = tiers_of(setup).store
    return cache(store) if word == "cache" else prune(msgspec.json.decode(asked, type=Prune), store)


if __name__ == "__main__":
    try:
        sys.exit(0 if main(sys.argv[1]) else 1)
    except FarmError as error:
        _tell(event="failed", name=None, error=error.as_dict())
        sys.exit(1)
    except KeyboardInterrupt:  # what came is kept
        sys.exit(130)
