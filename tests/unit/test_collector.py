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

_WORKER = """
import gc
from types import SimpleNamespace
from workers import app
from workers.steps import FarmStep
FarmStep.start(None, SimpleNamespace(farm=SimpleNamespace(start=lambda: None)))
print(gc.get_threshold()[0], gc.get_freeze_count(), len(gc.get_objects()))
"""
_ZYGOTE = """
import gc, socket
from types import SimpleNamespace
from workers.host.main import Zygote
usual = gc.get_threshold()[0]
ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
Zygote(ours)._set_up(SimpleNamespace(log_level="INFO", preimport=("transformers",)))
print(usual, gc.get_threshold()[0], gc.get_freeze_count(), len(gc.get_objects()))
"""
_WEB = """
import gc
from webapp import gunicorn_conf, main
gunicorn_conf.post_worker_init(None)
print(gc.get_threshold()[0], gc.get_freeze_count(), len(gc.get_objects()))
"""


def said(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("process", [_WEB, _WORKER])
def test_web_and_worker_look_seldom_and_not_among_their_libraries(process: str) -> None:
    young, frozen, others = map(int, said(process))
    assert young == YOUNG
    assert frozen > 50_000
    assert others < frozen // 20


def test_hosts_look_as_often_as_ever_but_not_among_their_libraries() -> None:
    usual, young, frozen, others = map(int, said(_ZYGOTE))
    assert young == usual
    assert frozen > 50_000
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
