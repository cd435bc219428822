"""Network namespaces by name: made, entered, removed.

Every name begins with the process that made it (`natlab-PID.START-`), so that what a dead run left behind is known and
removed by the next one, and two runs at once do not meet. All links are made inside the namespaces: the machine's own
network has none of them at any time.
"""

import ctypes
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

PREFIX = "natlab-"
FOLDER = Path("/run/netns")  # where `ip netns` keeps them
CLONE_NEWNET = 0x40000000
COMMAND_TIMEOUT_S = 20.0

Result = TypeVar("Result")


class LabError(Exception):
    """A command of the lab failed; it says which and why."""


def run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}\n{text}")
    return done.stdout


def _started(pid: int) -> str:
    """When this process was started, in clock ticks: a number may be used again, with its start it is one process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@cache
def _own_prefix(pid: int) -> str:
    return f"{PREFIX}{pid}.{_started(pid)}-"


class Namespace:
    """One network namespace."""

    def __init__(self, name: str) -> None:
        self.name = _own_prefix(os.getpid()) + name
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        # An IPv6 address may be used as soon as it is there, and none comes that nobody has given.
        self.set(ipv6__conf__default__accept_dad=0, ipv6__conf__default__accept_ra=0)

    @property
    def prefix(self) -> list[str]:
        """Before a command: runs it inside."""
        return ["ip", "netns", "exec", self.name]

    def ip(self, *arguments: str) -> str:
        return run("ip", "-n", self.name, *arguments)

    def exec(self, *command: str, text: str = "") -> str:
        return run(*self.prefix, *command, text=text)

    def set(self, **settings: str | int) -> None:
        """Kernel settings under /proc/sys/net: dots are written as double underscores."""

        def write() -> None:
            for name, value in settings.items():
                Path("/proc/sys/net", *name.split("__")).write_text(str(value))

        self.call(write)

    def call(self, function: Callable[[], Result]) -> Result:
        """What the function returns, called inside the namespace. Sockets that it opens belong to the namespace for
        good, whoever uses them afterwards."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                _enter(self.name)
                results.append(function())
            except BaseException as error:  # noqa: BLE001  raised again below, in the thread that asked
                errors.append(error)

        # A thread of its own: a namespace is entered by threads, and this one never comes back.
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def remove(self) -> None:
        _remove(self.name)


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(FOLDER / name, os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    finally:
        os.close(descriptor)


def _remove(name: str) -> None:
    for pid in run("ip", "netns", "pids", name).split():
        if int(pid) != os.getpid():  # a thread of ours may be inside for a moment
            with suppress(ProcessLookupError):
                _kill(int(pid))
    run("ip", "netns", "del", name)


def _kill(pid: int) -> None:
    """It is dead when this returns, whether its parent has collected it or not."""
    descriptor = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        dead, _, _ = select.select([descriptor], [], [], COMMAND_TIMEOUT_S)
    finally:
        os.close(descriptor)
    if not dead:
        raise LabError(f"process {pid} does not die of SIGKILL")


def list_own() -> list[str]:
    """The namespaces of this process that are there."""
    return [name for name in _list_names() if name.startswith(_own_prefix(os.getpid()))]


def _list_names() -> list[str]:
    return sorted(file.name for file in FOLDER.glob(PREFIX + "*")) if FOLDER.is_dir() else []


def remove_stale() -> None:
    """Namespaces whose maker is dead, and the processes in them. Those of runs that are still alive stay."""
    for name in _list_names():
        if not _is_alive(name):
            with suppress(LabError):  # another run has just removed it
                _remove(name)


def _is_alive(name: str) -> bool:
    pid, _, started = name.removeprefix(PREFIX).partition("-")[0].partition(".")
    try:
        return _started(int(pid)) == started
    except (OSError, ValueError):
        return False
