"""The entry point that gunicorn loads, once in each of its processes: ``gunicorn -c python:webapp.gunicorn_conf``."""

from flask import Flask

from common import faults
from common.errors import SetupError
from common.logs import configure_logs, get_logger
from common.settings import WebSettings, load_settings
from config_db.reader import SnapshotReader
from tasks.client import FarmClient
from tasks.objects import object_store
from webapp.app import create_app
from webapp.config_store import ConfigStore
from webapp.epoch_reports import EpochReports
from webapp.pool_sweeps import PoolSweeps

BOOT_FAILED = 3
"""The exit status on which gunicorn gives up instead of starting the process again and again."""


def build() -> Flask:
    """Read settings, load the snapshot, put the application together; exits with one line if that cannot be."""
    try:
        settings = load_settings(WebSettings)
        configure_logs(level=settings.log_level)
        faults.arm(settings.fault)
        reader = SnapshotReader(
            settings.database_url, poll_s=settings.config_poll_s, copy_path=settings.state_dir / "web-snapshot.msgpack"
        )
        reader.start()
    except SetupError as error:
        get_logger("webapp").error("web_cannot_start", reason=error.message)
        raise SystemExit(BOOT_FAILED) from error
    client = FarmClient(
        settings.redis_url,
        queue_limit=settings.queue_limit,
        result_ttl_s=settings.result_ttl_s,
        objects=object_store(settings.object_store, settings.object_store_endpoint),
    )
    EpochReports(client, reader, machine_profile=settings.machine_profile).start()
    PoolSweeps(reader, ConfigStore(settings.database_url)).start()
    return create_app(settings, reader, client)
