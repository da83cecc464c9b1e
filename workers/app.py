"""The Celery app of a worker: ``celery -A workers.app worker`` needs no further flags."""

from celery import Celery

from common import faults
from common.collector import collect_seldom
from common.errors import SetupError
from common.logs import configure_logs, get_logger
from common.settings import WorkerSettings, load_settings
from tasks.app import build_app
from tasks.names import TASK_NAMES
from workers.request import InferenceTask
from workers.steps import FarmStep, IntakeStep


def build_worker_app(settings: WorkerSettings) -> Celery:
    """The farm's Celery app with a body under every task name, and the farm's steps."""
    worker_app = build_app(
        settings.redis_url,
        farm_transport=settings.transport,
        pool=settings.pool,
        machine_profile=settings.machine_profile,
        result_ttl_s=settings.result_ttl_s,
        events=settings.events,
    )
    worker_app.conf.worker_consumer = "workers.consumer:FarmConsumer"
    vars(worker_app)["farm_settings"] = settings  # for FarmStep; not in conf, which `inspect conf` shows to anyone
    for name in TASK_NAMES.values():
        worker_app.register_task(type(f"Farm{name.title().replace('.', '')}", (InferenceTask,), {"name": name})())
    worker_app.steps["worker"].add(FarmStep)
    worker_app.steps["consumer"].add(IntakeStep)
    return worker_app


def _from_environment() -> Celery:
    collect_seldom()
    try:
        settings = load_settings(WorkerSettings)
    except SetupError as error:
        get_logger("workers").critical("worker_refused", reason=error.message)
        raise SystemExit(1) from None
    configure_logs(level=settings.log_level)
    faults.arm(settings.fault)
    return build_worker_app(settings)


app = _from_environment()
