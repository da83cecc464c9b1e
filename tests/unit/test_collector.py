"""Cyclic garbage: looked for seldom, not among what a process holds for good, and none made by a request's way in."""

import gc
import subprocess
import sys
from weakref import ref

import pytest
from gunicorn.workers.ggevent import GeventWorker

from common.collector import YOUNG
from tests.services import ROOT
from webapp import gunicorn_worker, unread

_WEB = """
import gc
from webapp import gunicorn_conf, main
gunicorn_conf.post_worker_init(None)
print(gc.get_threshold()[0], gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_a_web_process_looks_seldom_and_not_among_its_libraries() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _WEB], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    young, frozen, others = map(int, said.stdout.split())
    assert young == YOUNG
    assert frozen > 50_000  # Flask, SQLAlchemy, gevent
    assert others < frozen // 20


class _Request:
    def should_close(self) -> bool:
        return False


def test_a_request_is_gone_as_soon_as_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(unread, "is_read", lambda _: False)
    monkeypatch.setattr(GeventWorker, "handle_request", lambda _self, _name, req, *_: asked.append(req.should_close()))
    request = _Request()
    gone = ref(request)
    gc.disable()
    try:
        worker = object.__new__(gunicorn_worker.FarmWebWorker)
        worker.handle_request("", request, None, None)
        del request
        assert gone() is None
    finally:
        gc.enable()
    assert asked == [True]  # its body was not read: the connection is to be closed
