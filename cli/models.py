"""``farmhand models``: what is served, and its weights on this machine. Each command translates and calls."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cli import local_farm
from cli.config import DataDir, own_families
from cli.screen import Screen
from cli.weights import Transfer, ask
from common.errors import SetupError
from config_db.families import why_unsupported
from config_db.spec import plain

app = typer.Typer(help="What is served, and its weights on this machine.", invoke_without_command=True)

_UNITS = ("B", "KiB", "MiB", "GiB")
_STEP = 1024


@app.callback()
def models(context: typer.Context, data_dir: DataDir = local_farm.DATA_DIR) -> None:
    """List what is served, unless a command follows."""
    if context.invoked_subcommand is None:
        show(data_dir)


@app.command("list")
def show(
    data_dir: DataDir = local_farm.DATA_DIR,
    unsupported: Annotated[bool, typer.Option(help="list what is known and cannot be served, and why")] = False,
) -> None:
    """List what is served."""
    from cli import catalogue

    specs, families = catalogue.published(local_farm.database_url(data_dir)), own_families()
    refused = [(spec.id, spec.family, why) for spec in specs if (why := why_unsupported(spec, families)) is not None]
    screen = Screen()
    if unsupported:
        screen.table(("model", "family", "why it cannot be served"), refused)
        return
    without = {model for model, _, _ in refused}
    rows = [
        (spec.id, spec.family, ",".join(spec.operations), str(spec.source)) for spec in specs if spec.id not in without
    ]
    screen.table(("model", "family", "operations", "source"), rows)
    if refused:
        screen.note(f"{len(refused)} more cannot be served: `farmhand models list --unsupported` says why")


@app.command()
def prefetch(
    models: Annotated[list[str], typer.Argument(help="ids as served, or sources: hub:org/name@revision, s3://...")],
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Fetch weights to this machine, and to the bucket, before anybody asks for them."""
    asked = [{"name": name, **_asked(name, data_dir)} for name in models]
    screen, has_failed = Screen(), False
    with Transfer() as transfer:
        for told in ask("prefetch", asked):
            if told["event"] == "progress":
                transfer.show(told["name"], told["bytes"], told["total"])
            elif told["event"] == "done":
                screen.say(f"{told['name']}: {_size(told['bytes'])} in {told['path']}")
            else:
                has_failed = True
                screen.failed(f"{told['name']}: {told['error']['message']}")
    if has_failed:
        raise typer.Exit(1)


@app.command()
def cache() -> None:
    """List the weights that were fetched to this machine: size, last use, least recently used first."""
    rows = [
        (told["source"], _size(told["bytes"]), _instant(told["used_at"]), _state(told)) for told in ask("cache", {})
    ]
    Screen().table(("source", "size", "last use", "state"), rows)


@app.command()
def prune(
    sources: Annotated[list[str] | None, typer.Argument(help="which; as `farmhand models cache` lists them")] = None,
    every: Annotated[bool, typer.Option("--all", help="all that no worker uses")] = False,
    keep: Annotated[
        str | None, typer.Option(help="remove the least recently used until so much is left, as 50GiB")
    ] = None,
) -> None:
    """Remove fetched weights that no worker uses; without words, as many as the settings' bounds ask for."""
    if sum((bool(sources), every, keep is not None)) > 1:
        raise SetupError("name sources, or --all, or --keep: only one of them")
    asked = {"names": sources or [], "all": every, "keep_bytes": _bytes(keep) if keep is not None else None}
    screen, freed, is_whole = Screen(), 0, True
    for told in ask("prune", asked):
        if told["event"] == "removed":
            freed += told["bytes"]
            screen.say(f"removed {told['source']}, {_size(told['bytes'])}")
        elif told["event"] == "kept":
            is_whole = is_whole and every
            screen.trouble(f"kept {told['source']}: a worker uses it")
        else:
            is_whole = False
            screen.failed(f"no weights of {told['source']!r} are here")
    screen.say(f"{_size(freed)} freed")
    if not is_whole:
        raise typer.Exit(1)


def _asked(name: str, data_dir: Any) -> dict[str, Any]:
    """Where a model's weights are, as its name says or the config DB, which also says in which formats they may be."""
    if name.startswith("s3://"):
        return {"source": {"bucket": name}}
    if name.startswith("hub:"):
        repository, _, revision = name.removeprefix("hub:").partition("@")
        return {"source": {"hub": repository, **({"revision": revision} if revision else {})}}
    from cli import catalogue

    spec = catalogue.find(local_farm.database_url(data_dir), name)
    why = why_unsupported(spec, own_families())
    if why is not None:
        raise SetupError(f"model {name!r} cannot be served: {why}")
    return {"source": plain(spec.source), "formats": spec.trust.formats}


def _state(told: dict[str, Any]) -> str:
    words = [word for word, is_so in (("in use", told["in_use"]), ("not in the bucket yet", told["owed"])) if is_so]
    return ", ".join(words) or "-"


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in _UNITS:
        if count < _STEP or unit == _UNITS[-1]:
            break
        count /= _STEP
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise SetupError(f"--keep is {text!r}: it must be a size, as 50GiB") from error
