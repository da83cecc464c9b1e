"""Run a command without root's name, for programs that refuse to be root: ``python -m cli.unprivileged COMMAND...``.

In a user namespace of its own the command is ``nobody`` by name while its files stay root's, so that no directory has
to be opened to others. Where the kernel or a container forbids such namespaces, it really becomes ``nobody``; then its
files must be that account's (``owner_id``). An ordinary user's command runs as it is. Either way the command dies
with the process that started it.
"""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

ACCOUNT: Final = "nobody"
_CLONE_NEWUSER: Final = 0x10000000
_PR_SET_PDEATHSIG: Final = 1


@cache
def owner_id() -> int | None:
    """The user id that must own the files of an unprivileged command; None if the present owner may keep them."""
    if os.geteuid() != 0 or _has_namespaces():
        return None
    return pwd.getpwnam(ACCOUNT).pw_uid


def wrapped(command: list[str]) -> list[str]:
    """The command as this process must start it."""
    return command if os.geteuid() != 0 else [sys.executable, "-m", "cli.unprivileged", *command]


def _has_namespaces() -> bool:
    probe = subprocess.run([sys.executable, "-m", "cli.unprivileged", "true"], capture_output=True, check=False)
    return probe.returncode == 0 and b"namespace" not in probe.stderr


def main(command: list[str]) -> None:
    """Shed root's name and become the command."""
    parent = os.getppid()
    if os.geteuid() == 0:
        account = pwd.getpwnam(ACCOUNT)
        if not _enter_namespace(account):
            os.write(2, b"no user namespace: running as the account nobody\n")
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
    # after the change of credentials, which clears it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that wanted this is gone")
    os.execvp(command[0], command)  # noqa: S606 - becoming the given command is the purpose


def _enter_namespace(account: pwd.struct_passwd) -> bool:
    """Map the account's name onto root's own files; false where that is forbidden."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{account.pw_uid} 0 1")
        Path("/proc/self/gid_map").write_text(f"{account.pw_gid} 0 1")
    except OSError as error:
        sys.exit(f"the user namespace cannot be set up: {error}")
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
