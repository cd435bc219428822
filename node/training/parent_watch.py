"""How a process of the trainer ends with the one that started it.

Invariant: it never outlives that one, not even in the middle of a step.
"""

import ctypes
import os
import select
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(descriptor: int) -> None:
    """Arrange that this process dies when the other end of this socket does.

    The kernel's parent-death signal needs no cooperation of a busy interpreter, but is Linux's alone and comes too late
    for a parent that is already gone; the watching thread covers both."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_on_hangup, args=(descriptor,), daemon=True).start()


def _exit_on_hangup(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is reported without being asked for
    poll.poll()
    os._exit(0)
