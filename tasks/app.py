"""The Celery application that web tools, Flower and workers share: its name, serialisers, queues and broker."""

from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu import Queue

from tasks import transport
from tasks.names import LANES, queue_name


def build_app(
    redis_url: str,
    *,
    farm_transport: str,
    pool: str,
    machine_profile: str,
    result_ttl_s: int = 3600,
    events: bool = True,
) -> Celery:
    """A configured Celery app; nothing is connected yet.

    Args:
        redis_url: the farm's one logical database, broker and result backend at once.
        farm_transport: ``farm`` for batch pop, ``redis`` for kombu's own transport.
        pool: with ``machine_profile``, names the queues a worker consumes when given no ``-Q``.
        machine_profile: the GPU type, or ``cpu``.
        result_ttl_s: how long Celery's result backend keeps a result, in seconds.
        events: whether a worker sends Celery events.
    """
    transport.register()
    queues = [queue_name(pool, machine_profile, lane) for lane in LANES]
    app = Celery("farmhand", set_as_current=True)
    app.conf.update(
        broker_url=transport.broker_url(redis_url, farm_transport),
        result_backend=redis_url,
        broker_transport_options=dict(transport.connection_options()),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_heartbeat=0,
        task_queues=[Queue(queue, routing_key=queue, no_declare=True) for queue in queues],
        task_default_queue=queues[1],
        task_create_missing_queues=True,
        task_serializer="msgpack",
        result_serializer="msgpack",
        accept_content=["msgpack", "json"],
        result_accept_content=["msgpack", "json"],
        task_acks_late=True,
        task_track_started=False,
        task_ignore_result=False,
        task_default_delivery_mode=2,
        result_expires=result_ttl_s,
        worker_pool="solo",
        worker_concurrency=1,
        worker_disable_rate_limits=True,
        worker_enable_remote_control=True,
        worker_send_task_events=events,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_soft_shutdown_timeout=0,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_prefetch_multiplier=512,
        control_queue_expires=10,
        enable_utc=True,
        **_tls(redis_url),
    )
    # Celery would take the tasks' serializer, and whoever asks workers from outside reads nothing but JSON.
    app.control.mailbox.serializer = "json"  # type: ignore[attr-defined]  # the stubs lack it
    return app


def _tls(redis_url: str) -> dict[str, Any]:
    """Broker and backend TLS for a ``rediss`` URL: certificates are verified."""
    if urlsplit(redis_url).scheme != "rediss":
        return {}
    return {"broker_use_ssl": {"ssl_cert_reqs": "required"}, "redis_backend_use_ssl": {"ssl_cert_reqs": "required"}}
