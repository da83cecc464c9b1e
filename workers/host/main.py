"""The zygote: imports what hosts need, once, and forks a host whenever the worker asks for one.

``python -m workers.host.main <control descriptor> <worker's pid>``, started by exec from ``workers.hosts``. A new
host is there in milliseconds and shares the imported pages, so a standby is always at hand and costs nothing. The
zygote starts no thread, touches no device and tokenises nothing: what it did not begin, a fork cannot break.

It dies with the worker and its hosts die with it, however the worker ends. It reaps them and says how each died.
"""

import gc
import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from time import monotonic
from typing import Final

from common.collector import collect_seldom, keep_for_good
from common.logs import configure_logs, get_logger
from workers.host import frames
from workers.host.frames import Exited, Fork, HostSetup, Imported, Kill
from workers.host.host import Host
from workers.host.orphans import die_with_parent
from workers.host.stages import Board

log = get_logger("host")

_PACKET_BYTES: Final = 1 << 18
_OOM_SCORE: Final = "800"
"""The kernel is to kill a host before it kills the worker, Redis or Postgres."""


class Zygote:
    """Forks and reaps. ``control`` is the SOCK_SEQPACKET pair to the worker; its end of file is the order to leave."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._hosts: dict[int, int] = {}
        self._setup: HostSetup
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Until the worker closes the control channel; then end every host."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        while True:
            readable, _, _ = select.select([self._control.fileno(), self._woken], [], [])
            if self._woken in readable:
                with suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                self._reap()
            if self._control.fileno() in readable and not self._on_packet():
                break
        self._end_all()

    def _on_packet(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, _PACKET_BYTES, 2)
        if not data:
            return False
        match frames.to_zygote.decode(data):
            case HostSetup() as setup:
                self._set_up(setup)
            case Fork(host, device):
                self._fork(host, device, *descriptors)
            case Kill(host):
                for pid in [pid for pid, number in self._hosts.items() if number == host]:
                    os.kill(pid, signal.SIGKILL)  # our child and not yet reaped, so the pid is still its own
        return True

    def _set_up(self, setup: HostSetup) -> None:
        """Import what the hosts shall share. A module that cannot be imported fails the loads that need it."""
        self._setup = setup
        configure_logs(level=setup.log_level)
        usual = gc.get_threshold()
        collect_seldom()
        started, failure = monotonic(), None
        for module in setup.preimport:
            try:
                import_module(module)
            except Exception as error:
                failure = f"{module}: {type(error).__name__}: {error}"
                log.exception("preimport_failed", module=module)
        keep_for_good()
        gc.set_threshold(*usual)
        self._tell(Imported(monotonic() - started, failure))

    def _fork(self, host: int, device: str, link_fd: int, board_fd: int) -> None:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(zygote)
            run_host(self._setup, [self._control.detach(), self._woken, self._wake], device, link_fd, board_fd)
        os.close(link_fd)
        os.close(board_fd)
        self._hosts[pid] = host

    def _reap(self) -> None:
        while self._hosts:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            host = self._hosts.pop(pid, None)
            if host is not None:
                self._tell(Exited(host, os.waitstatus_to_exitcode(status)))

    def _tell(self, message: frames.FromZygote) -> None:
        with suppress(OSError):  # the worker has gone: the next read says so
            self._control.send(frames.packet(message))

    def _end_all(self) -> None:
        for pid in self._hosts:
            os.kill(pid, signal.SIGKILL)
        for pid in self._hosts:
            os.waitpid(pid, 0)


def run_host(setup: HostSetup, zygote_fds: list[int], device: str, link_fd: int, board_fd: int) -> None:
    """In the forked child: let go of the zygote's descriptors and become a host; never returns."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in zygote_fds:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would delay the news of the death
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(_OOM_SCORE)
        board = Board(board_fd)
        os.close(board_fd)
        Host(setup, socket.socket(fileno=link_fd), board, device).serve()
    except BaseException as error:
        log.exception("host_failed", error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(1)


def main(control_fd: int, worker_pid: int) -> None:
    """Serve as the zygote of this worker."""
    die_with_parent(worker_pid)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the worker decides when to end
    Zygote(socket.socket(fileno=control_fd)).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
