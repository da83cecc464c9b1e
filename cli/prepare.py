"""A step of ``farmhand up``: bring the config DB to the newest schema and publish the models the farm starts with.

A process of its own, so that what it imports does not stay in memory as long as the farm runs, and so that it can be
imported while PostgreSQL is still starting. Prints JSON; a refusal is one line and status 1.
"""

import argparse
import json
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Final

import psycopg
import redis
from psycopg import conninfo, sql

from cli import catalogue
from common.errors import FarmError, SetupError
from common.settings import CommonSettings, load_settings
from config_db.catalog import read_catalog
from config_db.engine import reason
from config_db.migrate import migrate

RETRY_S: Final = 0.03


def main() -> None:
    options = _options()
    try:
        settings = load_settings(CommonSettings)
        database_url = settings.database_url
        if options.ask_redis:
            _ask_redis(settings.redis_url)
        _await_database(database_url, wait_s=options.wait_s, create=options.create)
        migrate(database_url)
        specs = catalogue.specs_of_directories(options.model_dir)
        if options.demo:
            specs.insert(0, catalogue.demo_spec())
        started_with = [spec.id for spec in specs]
        if options.catalog is not None:
            named = {spec.id for spec in specs}  # what the command line names wins
            specs += [spec for spec in read_catalog(options.catalog) if spec.id not in named]
        epoch = catalogue.offer(database_url, specs, reason="farmhand up")
        served = {spec.id for spec in catalogue.published(database_url)}
        first = next((name for name in started_with if name in served), None)
    except FarmError as error:
        sys.stderr.write(json.dumps({"event": "farm_not_prepared", "reason": error.message}) + "\n")
        sys.exit(1)
    sys.stdout.write(json.dumps({"epoch": epoch, "models": len(served), "first": first}))


def _ask_redis(url: str) -> None:
    """SetupError if the operator's own Redis does not answer; of the farm's own, the supervisor knows."""
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        raise SetupError(f"Redis does not answer: {error}; is FARMHAND_REDIS_URL right?") from error


def _await_database(database_url: str, *, wait_s: float, create: bool) -> None:
    """Wait until PostgreSQL takes connections; make the database if it may be made."""
    deadline = monotonic() + wait_s
    while True:
        try:
            psycopg.connect(database_url, connect_timeout=3).close()
        except psycopg.OperationalError as error:
            if create and _is_missing(error):
                _create(database_url)
            elif monotonic() > deadline:
                raise SetupError(
                    f"PostgreSQL does not answer: {reason(error)}; is FARMHAND_DATABASE_URL right?"
                ) from error
            else:
                sleep(RETRY_S)
        else:
            return


def _is_missing(error: psycopg.OperationalError) -> bool:
    """Whether it is the database that is missing; a failed connection carries no code, only the server's words."""
    return "does not exist" in str(error) and "database" in str(error)


def _create(database_url: str) -> None:
    name = str(conninfo.conninfo_to_dict(database_url)["dbname"])
    with psycopg.connect(database_url, dbname="postgres", connect_timeout=3, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wait-s", type=float, required=True)
    parser.add_argument("--ask-redis", action="store_true")
    parser.add_argument("--create", action="store_true")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--catalog", type=Path)
    parser.add_argument("--model-dir", type=Path, action="append", default=[])
    return parser.parse_args()


if __name__ == "__main__":
    main()
