"""The worker's hand on its zygote: starts it, has it fork and kill hosts, hears how they end, replaces it.

Owns the process and the control channel. The other end is ``workers.host.main``.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from common.logs import get_logger
from workers.host import frames, stages
from workers.host.frames import Exited, Fork, Imported, Kill
from workers.host.stages import EXIT_DEVICE_LOST, Board
from workers.hosts.config import HostConfig

log = get_logger("workers")

STATUS_WAIT_S: Final = 0.5
"""How long to wait to be told how a process died."""
BACK_OFF_S: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Before the next try, by how often in a row a host, or the zygote, died before it was of use."""
_READ_BYTES: Final = 1 << 18


class Zygote:
    """One zygote after the other. All on the event loop's thread, but for ``kill``.

    Args:
        config: what it and its hosts are started with.
        on_started: it can be asked for hosts.
        on_exited: this host ended, with this status.
        on_lost: it died, and its hosts with it, for this reason; another is on its way.
    """

    def __init__(
        self,
        config: HostConfig,
        *,
        on_started: Callable[[], None],
        on_exited: Callable[[int, int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._config = config
        self._tell_started = on_started
        self._tell_exited = on_exited
        self._tell_lost = on_lost
        self._hub: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started_at = 0.0
        self._deaths = 0
        self._is_stopped = False

    @property
    def is_up(self) -> bool:
        """Whether it can be asked for hosts, as far as is known."""
        return self._control is not None

    def start(self) -> None:
        """Bring it up and tell it what hosts need. It dies with the thread that calls this."""
        if self._is_stopped:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "workers.host.main", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                env=self._config.environment(),
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        self._control = ours
        self._started_at = monotonic()
        ours.send(frames.packet(self._config.setup()))
        self._listen()
        self._tell_started()

    def register(self, hub: Any) -> None:
        """Read on this hub from now on; called again after every ``hub.reset()``."""
        self._hub = hub
        self._listen()

    def fork(self, number: int, device: str) -> tuple[socket.socket, Board]:
        """Ask for a host; returns our ends of its link and its board, theirs travel with the request.

        Raises:
            OSError: no descriptors, or the zygote has just died and its end of file is about to be read.
        """
        assert self._control is not None  # the caller has asked ``is_up``
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                descriptor = stages.create_board()
                try:
                    socket.send_fds(self._control, [frames.packet(Fork(number, device))], [theirs.fileno(), descriptor])
                    board = Board(descriptor)
                finally:
                    os.close(descriptor)
            except OSError:
                ours.close()
                raise
        return ours, board

    def kill(self, number: int) -> None:
        """Have it kill a host; from any thread. OSError if the order cannot be given now."""
        control = self._control
        if control is not None:
            control.send(frames.packet(Kill(number)))

    def stop(self, timeout_s: float) -> None:
        """End it, and with it its hosts; afterwards no child is left."""
        self._is_stopped = True
        self._close_control()
        if self._process is not None:
            _end(self._process, timeout_s)
            self._process = None

    def _listen(self) -> None:
        if self._hub is not None and self._control is not None:
            self._hub.remove_reader(self._control.fileno())
            self._hub.add_reader(self._control.fileno(), self._on_control)

    def _on_control(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._on_lost()
                return
            match frames.from_zygote.decode(data):
                case Imported(seconds, error):
                    log.info("zygote_ready", import_s=round(seconds, 3), error=error)
                case Exited(number, status):
                    self._tell_exited(number, status)

    def _on_lost(self) -> None:
        """Say so and start over, with patience if it died young."""
        assert self._process is not None  # its channel was open
        _end(self._process, STATUS_WAIT_S)
        reason = f"the zygote ended ({describe_status(self._process.returncode)})"
        self._close_control()
        lived_s = monotonic() - self._started_at
        self._deaths = self._deaths + 1 if lived_s < BACK_OFF_S[-1] else 0
        wait_s = back_off(self._deaths)
        log.error("zygote_lost", reason=reason, again_in_s=wait_s)
        self._tell_lost(reason)
        self._hub.call_later(wait_s, self._restart)

    def _restart(self) -> None:
        try:
            self.start()
        except OSError as error:  # no process, descriptor or memory to be had at the moment
            log.warning("zygote_not_started", error=str(error), again_in_s=BACK_OFF_S[-1])
            self._close_control()
            self._hub.call_later(BACK_OFF_S[-1], self._restart)

    def _close_control(self) -> None:
        if self._control is not None:
            if self._hub is not None:
                self._hub.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None


def back_off(deaths: int) -> float:
    """Seconds before the next try, after so many early deaths in a row."""
    return BACK_OFF_S[min(deaths, len(BACK_OFF_S) - 1)]


def describe_status(status: int) -> str:
    """An exit status in words; negative is a signal's number."""
    if status == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return "the device was lost" if status == EXIT_DEVICE_LOST else f"exit {status}"


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for a process that was told to end; kill it when it does not."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
