"""``farmhand``: the command line. Each command translates and calls; a refusal is one line and status 1."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import config, keys, local_farm, models
from cli.config import DataDir
from cli.screen import Screen
from common.errors import FarmError, SetupError

app = typer.Typer(
    help="Serves embedding models: one API, one queue, shared devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
letters = typer.Typer(help="Messages the farm has given up.", no_args_is_help=True)
app.add_typer(config.app, name="config")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(letters, name="dead-letters")

PORT = {"min": 1, "max": 65535}


@app.command()
def up(
    host: Annotated[str, typer.Option(help="where the API listens; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the API", **PORT)] = 8080,
    flower_port: Annotated[int, typer.Option(help="of Flower, on this machine only", **PORT)] = 5555,
    flower: Annotated[bool, typer.Option("--flower/--no-flower", help="show the workers and tasks in Flower")] = True,
    data_dir: Annotated[Path, typer.Option(help="where the farm keeps everything")] = Path(".farmhand"),
    machine_profile: Annotated[
        str, typer.Option(help="what the workers run on, as requests name it", envvar="FARMHAND_MACHINE_PROFILE")
    ] = "cpu",
    workers: Annotated[int, typer.Option(help="worker processes", min=1)] = 1,
    hosts: Annotated[str, typer.Option(help="model processes of a worker; auto: as many as fit the machine")] = "auto",
    model_dir: Annotated[
        list[Path] | None, typer.Option(help="a directory with a model to serve under the directory's name; repeatable")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo/--no-demo", help="serve the demo model")] = True,
) -> None:
    """Start a whole farm on this machine and serve until Ctrl-C."""
    from cli.farm import FarmOptions
    from cli.up import up as bring_up

    options = FarmOptions(
        host=host,
        port=port,
        flower_port=flower_port,
        has_flower=flower,
        machine_profile=machine_profile,
        workers=workers,
        hosts=_hosts(hosts),
        model_dirs=tuple(model_dir or ()),
        has_demo=demo,
    )
    bring_up(options, data_dir, Screen())


@app.command()
def migrate(data_dir: DataDir = local_farm.DATA_DIR) -> None:
    """Bring the config DB to the newest schema."""
    from config_db.migrate import migrate as run_migrations

    run_migrations(local_farm.database_url(data_dir))
    Screen().say("the config DB is at the newest schema")


@letters.command("list")
def list_letters(data_dir: DataDir = local_farm.DATA_DIR) -> None:
    """Show them, newest first."""
    from cli.dead_letters import DeadLetterBox

    with DeadLetterBox(local_farm.redis_url(data_dir)) as box:
        rows = [
            (str(number), letter.at or "-", letter.reason or "-", letter.queue or "-", letter.task_id or "-")
            for number, letter in enumerate(box.letters(), start=1)
        ]
    Screen().table(("number", "at", "reason", "queue", "task"), rows)


@letters.command("replay")
def replay(
    task_id: Annotated[list[str] | None, typer.Argument(help="which; as listed")] = None,
    every: Annotated[bool, typer.Option("--all", help="all of them")] = False,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Put messages back into their queues."""
    from cli.dead_letters import DeadLetterBox

    wanted = set(task_id or ())
    if bool(wanted) == every:
        raise SetupError("name the tasks to replay, or --all")
    with DeadLetterBox(local_farm.redis_url(data_dir)) as box:
        chosen = [letter for letter in box.letters() if every or letter.task_id in wanted]
        missing = wanted - {letter.task_id for letter in chosen}
        if missing:
            raise SetupError(f"no dead letter of task {', '.join(sorted(missing))}")
        done = sum(box.replay(letter) for letter in chosen)
    Screen().say(f"{done} replayed")


def main() -> None:
    """The entry point."""
    try:
        app()
    except FarmError as error:
        Screen().failed(error.message)
        sys.exit(1)
    except OSError as error:
        Screen().failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)


def _hosts(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor auto", param_hint="--hosts")
    return int(text)


if __name__ == "__main__":
    main()
