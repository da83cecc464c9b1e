"""``farmhand keys``: who may call the API."""

import re
from datetime import UTC, datetime, timedelta
from getpass import getuser
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from cli import local_farm
from cli.config import DataDir
from cli.screen import Screen
from common.errors import SetupError

if TYPE_CHECKING:
    from config_db.access import Scope
    from config_db.spec import LatencyClass

app = typer.Typer(help="API keys: who may call.", no_args_is_help=True)

_UNITS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="whose requests they will be")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="infer, jobs, pools, config or admin; repeatable; infer if none is named")
    ] = None,
    latency_class: Annotated[
        str, typer.Option("--class", help="interactive, standard, batch or experiment: requests rank no higher")
    ] = "interactive",
    expires: Annotated[str | None, typer.Option(help="as 12h, 90d or 4w; never if not given")] = None,
    note: Annotated[str | None, typer.Option(help="what it is for")] = None,
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Make a key and print it, the only time that it is shown."""
    from cli.database import writing
    from config_db import keys as repository

    with writing(local_farm.database_url(data_dir)) as session:
        made = repository.create(
            session,
            tenant=tenant,
            scopes=cast("list[Scope]", scope or ["infer"]),
            latency_class=cast("LatencyClass", latency_class),
            expires_at=None if expires is None else datetime.now(UTC) + _span(expires),
            note=note,
            actor=getuser(),
            reason="farmhand keys create",
        )
    Screen().say(made.key)


@app.command("list")
def list_keys(data_dir: DataDir = local_farm.DATA_DIR) -> None:
    """Show the keys, without what makes them secret."""
    from cli.database import reading
    from config_db import keys as repository

    with reading(local_farm.database_url(data_dir)) as session:
        known = repository.listed(session)
    now = datetime.now(UTC)
    rows = [
        (
            key_id,
            spec.tenant,
            ",".join(spec.scopes),
            spec.latency_class,
            "usable" if spec.is_usable(now) else "revoked" if spec.revoked_at else "expired",
            f"{spec.expires_at:%Y-%m-%d %H:%M}" if spec.expires_at else "-",
            spec.note or "-",
        )
        for key_id, spec in sorted(known.items(), key=lambda one: one[1].created_at)
    ]
    Screen().table(("id", "tenant", "scopes", "class", "state", "expires", "note"), rows)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="as listed")],
    data_dir: DataDir = local_farm.DATA_DIR,
) -> None:
    """Refuse a key from now on, in every process within a poll."""
    from cli.database import writing
    from config_db import keys as repository

    with writing(local_farm.database_url(data_dir)) as session:
        repository.revoke(session, key_id.removeprefix("fh_"), actor=getuser(), reason="farmhand keys revoke")
    Screen().say(f"{key_id} is revoked")


def _span(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if found is None or int(found[1]) == 0:
        raise SetupError(f"--expires takes a time as 12h, 90d or 4w, not {text!r}")
    return int(found[1]) * _UNITS[found[2]]
