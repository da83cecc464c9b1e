"""What the farm leans on inside Celery, kombu and redis-py. Red here means: read their changes before raising a pin."""

import inspect
import socket
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from typing import Any

import pytest
from celery.worker import request, state
from celery.worker.consumer import Consumer
from celery.worker.consumer import consumer as consumer_module
from celery.worker.consumer.tasks import Tasks
from celery.worker.loops import asynloop
from kombu.asynchronous.hub import Hub
from kombu.pidbox import Mailbox, Node
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.connection import Connection, ConnectionPool

from tasks.app import build_app
from tasks.transport import FarmChannel, FarmQoS, FarmTransport


@pytest.mark.parametrize(("package", "minor"), [("celery", "5.7."), ("kombu", "5.7."), ("redis", "8.1.")])
def test_the_tested_minor_version_is_installed(package: str, minor: str) -> None:
    assert version(package).startswith(minor)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (kombu_redis.Channel._brpop_start, ["self", "timeout"]),
        (kombu_redis.Channel._brpop_read, ["self", "options"]),
        (kombu_redis.Channel._restore, ["self", "message", "leftmost"]),
        (kombu_redis.Channel.conn_or_acquire, ["self", "client"]),
        (Node.reply, ["self", "data", "exchange", "routing_key", "ticket", "kwargs"]),
        (kombu_redis.QoS.append, ["self", "message", "delivery_tag"]),
        (kombu_redis.QoS.ack, ["self", "delivery_tag"]),
        (kombu_redis.QoS.reject, ["self", "delivery_tag", "requeue"]),
        (kombu_redis.QoS.can_consume, ["self"]),
        (request.Request._announce_revoked, ["self", "reason", "terminated", "signum", "expired"]),
        (request.Request.terminate, ["self", "pool", "signal"]),
        (Consumer.ensure_connected, ["self", "conn"]),
        (Consumer.update_strategies, ["self"]),
        (Connection.pack_command, ["self", "args"]),
        (Connection.send_packed_command, ["self", "command", "check_health"]),
        (ConnectionPool.make_connection, ["self"]),
        (Hub.add_reader, ["self", "fds", "callback", "args"]),
        (Hub.add_writer, ["self", "fds", "callback", "args"]),
        (Hub.call_repeatedly, ["self", "delay", "callback", "args"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_signature_we_override_or_call_has_not_moved(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("source_of", "fragment"),
    [
        (kombu_redis.MultiChannelPoller._register_BRPOP, "channel._brpop_start()"),
        (kombu_redis.MultiChannelPoller.on_poll_start, "channel.qos.can_consume()"),
        (Tasks.start, "c.update_strategies()"),
        (asynloop, "obj.register_with_event_loop(hub)"),
        (consumer_module.Consumer.on_close, "reserved_requests.clear()"),
        (virtual.Channel.close, "restore_unacked_once"),
        (Node.reply, "serializer=self.mailbox.serializer"),
        (Mailbox._publish, "serializer or self.serializer"),
        (state.task_reserved, "add_reserved_request(request)"),
        (state.maybe_shutdown, "should_stop is not None"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_habit_we_rely_on_is_still_in_the_source(source_of: Callable[..., Any], fragment: str) -> None:
    assert fragment in inspect.getsource(source_of)


def test_our_transport_is_redis_to_celery() -> None:
    """Celery's events, control and prefetch look at the driver's type."""
    assert FarmTransport.driver_type == "redis"
    assert FarmTransport.Channel is FarmChannel
    assert FarmChannel.QoS is FarmQoS


def test_workers_are_asked_and_answer_in_json_and_tasks_stay_msgpack() -> None:
    """Whoever inspects workers from outside, as Flower does, refuses all else."""
    app = build_app("redis://127.0.0.1:1/0", farm_transport="farm", pool="default", machine_profile="cpu")
    assert app.control.mailbox.serializer == "json"
    assert app.conf.task_serializer == "msgpack"


def test_a_reset_hub_has_forgotten_its_readers() -> None:
    """Why everything registers again after each reconnect."""
    left, right = socket.socketpair()
    with left, right, closing(Hub()) as hub:
        hub.add_reader(left.fileno(), lambda: None)
        hub.reset()
        assert not hub.readers


def test_one_descriptor_cannot_be_both_reader_and_writer_of_a_hub() -> None:
    """Why writers get a duplicate descriptor: the second registration of one is ignored by the poller."""
    written: list[str] = []
    left, right = socket.socketpair()
    with left, right, closing(Hub()) as hub:
        hub.add_reader(left.fileno(), lambda: None)
        hub.add_writer(left.fileno(), written.append, "writable")
        hub.call_repeatedly(0.01, lambda: None)
        for _ in range(5):
            hub.run_once()
        assert written == []
