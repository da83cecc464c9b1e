"""``farmhand config``: the config DB from files, as one epoch a change. Each command translates and calls."""

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from cli import local_farm
from cli.screen import Screen
from common.errors import SetupError
from common.settings import CommonSettings, load_settings

if TYPE_CHECKING:
    from config_db.config_files import ConfigFiles
    from config_db.convergence import Epoch
    from config_db.history import RowChange

app = typer.Typer(help="The config DB: what is served.", no_args_is_help=True)

EPOCHS: Final = {"min": 0, "max": 2**63 - 1}
"""What the config DB counts with."""
HAS_CHANGES = 2
"""Exit status of a plan that would change something."""

Directory = Annotated[Path, typer.Argument(help="a directory of YAML files, as catalog/")]
Prune = Annotated[bool, typer.Option("--prune", help="also take away what the files do not name")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]
Actor = Annotated[str | None, typer.Option(help="who changes it, for the history; your login name unless given")]
Reason = Annotated[str | None, typer.Option(help="why, for the history")]
DataDir = Annotated[
    Path,
    typer.Option(
        help="of the farm on this machine whose servers are meant when the environment names none",
        callback=local_farm.check_given,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


class _Plan(TyperCommand):
    """A misspelt word is an error as any other: status 2 says that there are changes."""

    def make_context(self, *words: Any, **rest: Any) -> Any:
        try:
            return super().make_context(*words, **rest)
        except Exception as error:
            if getattr(error, "exit_code", None) == HAS_CHANGES:
                error.exit_code = 1  # type: ignore[attr-defined]  # looked at in the line above
            raise


@app.command(cls=_Plan)
def plan(
    directory: Directory, prune: Prune = False, as_json: AsJson = False, data_dir: DataDir = local_farm.DATA_DIR
) -> None:
    """Show what apply would change: + added, ~ changed, - removed. Status 0: nothing, 2: something, 1: an error."""
    files = _read(directory)
    epoch, found = _planned(files, local_farm.database_url(data_dir), prune=prune)
    _show_plan(found, as_json=as_json, epoch=epoch)
    _warn(files)
    if found:
        raise typer.Exit(HAS_CHANGES)


@app.command()
def apply(
    directory: Directory,
    prune: Prune = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when every live process serves the new epoch")] = False,
    timeout: Annotated[float, typer.Option(help="seconds to wait, at most", min=0)] = 60,
    yes: Yes = False,
    actor: Actor = None,
    reason: Reason = None,
    expect: Annotated[int | None, typer.Option(help="refuse unless the config DB is at this epoch", **EPOCHS)] = None,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Make the config DB say what the files say: all of it as one epoch, or nothing. On a terminal it asks first."""
    from cli import changes
    from cli.database import writing
    from config_db.reconcile import apply_files

    files = _read(directory)
    url = local_farm.database_url(data_dir)
    is_asking = sys.stdin.isatty() and not yes
    if is_asking:
        epoch, found = _planned(files, url, prune=prune, expect=expect)
        _show_plan(found)
        if found:
            _confirm("Apply this?")
        expect = epoch
    with writing(url) as session:
        published = apply_files(
            session,
            files,
            prune=prune,
            actor=actor or _user(),
            reason=reason or f"config apply {directory.resolve().name}",
            expected=expect,
        )
    done = changes.described(published.changes)
    if not is_asking:
        changes.show(Screen(), done)
    Screen().say("epoch {}: {} added, {} changed, {} removed".format(published.epoch, *changes.counts(done)))
    if wait:
        from cli.converging import await_epoch

        redis_url = local_farm.redis_url(data_dir)
        count = await_epoch(redis_url, published.epoch, present=lambda: _present(url), timeout_s=timeout)
        Screen().say(f"epoch {published.epoch} is served by {_count(count, 'live process', 'live processes')}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="where to; made if it is not there")],
    force: Annotated[bool, typer.Option("--force", help="replace the config that the directory holds")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="with the JSON Schema, and the line that editors read")
    ] = False,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Write what is served as YAML files, which apply reads back. Never keys."""
    from cli import export_folder
    from cli.database import reading
    from config_db.epochs import epoch_now

    replaced = export_folder.check_free(directory, force=force, families=own_families())
    with reading(local_farm.database_url(data_dir)) as session:
        epoch, _ = epoch_now(session)
        files = export_folder.render(session, with_schema=schema)
    export_folder.write(directory, files, replaced=replaced)
    Screen().say(f"{_count(len(files), 'file')} of epoch {epoch} in {directory}")


@app.command()
def history(
    limit: Annotated[int, typer.Option(help="epochs to show", min=1, max=EPOCHS["max"])] = 20,
    prune: Annotated[bool, typer.Option("--prune", help="first purge all that is older than the farm keeps")] = False,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """List the epochs, newest first: when, who, why, and how many rows were added, changed and removed."""
    from cli.database import reading, writing
    from config_db import retention
    from config_db.epoch_entries import latest_epochs

    if prune:
        with writing(local_farm.database_url(data_dir)) as session:
            begins = retention.prune(session)
        Screen().say(f"the history begins with epoch {begins}")
    with reading(local_farm.database_url(data_dir)) as session:
        entries = latest_epochs(session, limit=limit)
    rows = [
        (
            str(entry.epoch),
            entry.at.isoformat(timespec="seconds"),
            _one_line(entry.actor),
            _one_line(entry.reason),
            f"+{entry.added} ~{entry.changed} -{entry.removed}",
        )
        for entry in entries
    ]
    Screen().table(("epoch", "at", "actor", "reason", "rows"), rows)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="its id, or an alias")], data_dir: DataDir = local_farm.DATA_DIR
) -> None:
    """Print a model's YAML."""
    from cli.catalogue import find
    from config_db.export import model_yaml

    Screen().write(model_yaml(find(local_farm.database_url(data_dir), model)))


@app.command()
def diff(
    before: Annotated[int, typer.Argument(metavar="A", help="an epoch", **EPOCHS)],
    after: Annotated[
        int | None, typer.Argument(metavar="B", help="another; the present one unless given", **EPOCHS)
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Show what differs between two epochs, keys apart."""
    from cli.database import reading
    from config_db.epochs import epoch_now
    from config_db.history import changes_between

    with reading(local_farm.database_url(data_dir)) as session:
        last = epoch_now(session)[0] if after is None else after
        found = changes_between(session, before, last)
    _show_plan(found, as_json=as_json, before=before, after=last)


@app.command()
def rollback(
    epoch: Annotated[int, typer.Argument(help="whose contents come back, as a new epoch", **EPOCHS)],
    yes: Yes = False,
    actor: Actor = None,
    reason: Reason = None,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Bring back the contents of an epoch, keys apart: one that was revoked stays so."""
    from cli import changes
    from cli.database import reading, writing
    from config_db.epochs import epoch_now
    from config_db.past import rollback as roll_back
    from config_db.past import undoing
    from config_db.publish import planned

    url = local_farm.database_url(data_dir)
    with reading(url) as session:
        present, _ = epoch_now(session)
        found = changes.described(planned(session, undoing(session, epoch)))
    _show_plan(found)
    if not found:
        return
    if not yes:
        _confirm(f"Bring back epoch {epoch}?")
    with writing(url) as session:
        published = roll_back(
            session, epoch, actor=actor or _user(), reason=reason or f"config rollback {epoch}", expected=present
        )
    Screen().say(f"epoch {published.epoch}")


@app.command()
def validate(directory: Directory) -> None:
    """Check every file without a database; all errors are listed."""
    files = _read(directory)
    kinds = [put.kind for put in files.puts]
    count = ", ".join(_count(kinds.count(kind), kind) for kind in dict.fromkeys(["model", *kinds]))
    Screen().say(f"{count} in {_count(len(files.files), 'file')}: no errors")


@app.command("schema")
def write_schema(
    file: Annotated[Path | None, typer.Argument(help="where to; standard output unless given")] = None,
) -> None:
    """Write the JSON Schema of a model's YAML, for editors."""
    from config_db.json_schema import schema_text

    if file is None:
        Screen().write(schema_text())
    else:
        file.write_text(schema_text(), encoding="utf-8")


def _read(directory: Path) -> "ConfigFiles":
    """The files of a directory; SetupError, each fault told, unless all are right."""
    from config_db.config_files import read_files

    files = read_files(directory, families=own_families())
    if not files.files:
        raise SetupError(f"{directory} holds no YAML file")
    if files.faults:
        screen = Screen()
        for fault in files.faults[:-1]:
            screen.failed(str(fault))
        raise SetupError(str(files.faults[-1]))
    return files


def own_families() -> list[str]:
    """Names of the operator's own families."""
    return [*load_settings(CommonSettings).family_places]


def _present(url: str) -> "Epoch":
    from cli.database import reading
    from config_db.convergence import Epoch
    from config_db.epochs import epoch_now

    with reading(url) as session:
        number, epoch_id = epoch_now(session)
    return Epoch(number, str(epoch_id))


def _planned(
    files: "ConfigFiles", url: str, *, prune: bool, expect: int | None = None
) -> "tuple[int, list[RowChange]]":
    """What the files would change, and the epoch that they are compared with."""
    from cli import changes
    from cli.database import reading
    from config_db.epochs import epoch_now
    from config_db.publish import check_expected
    from config_db.reconcile import plan_files

    with reading(url) as session:
        epoch, _ = epoch_now(session)
        check_expected(epoch, expect)
        return epoch, changes.described(plan_files(session, files, prune=prune))


def _warn(files: "ConfigFiles") -> None:
    """Say on standard error what no worker with this process's own model directories would load, or use."""
    from config_db.families import in_vain
    from config_db.model_roots import outside

    roots = load_settings(CommonSettings).model_roots
    for spec in files.specs:
        for warning in (*in_vain(spec), *outside(spec, roots)):
            Screen().warn(f"{spec.id}: {warning}")


def _show_plan(found: "Sequence[RowChange]", *, as_json: bool = False, **epochs: int) -> None:
    from cli import changes

    screen = Screen()
    if as_json:
        screen.write(changes.as_json(found, **epochs))
        return
    changes.show(screen, found)
    screen.say(changes.planned(found), style="bold")


def _confirm(question: str) -> None:
    try:
        is_sure = typer.confirm(question, err=True)
    except typer.Abort:
        is_sure = False
    if not is_sure:
        raise SetupError("nothing was changed: nobody said yes (--yes says it beforehand)")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "farmhand"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _one_line(text: str) -> str:
    """What somebody has written, fit for a line of a table."""
    return "".join(char if char.isprintable() else " " for char in text)
