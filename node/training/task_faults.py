"""What a task's code raises, made into one error that says what was raised, and where in that code.

The code of a task may be a stranger's, so that anything may come out of it: this is the one place of the trainer that
catches everything. Needs no torch.

Invariant: the text of a fault fits a report's `detail`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType

from shoal.node.training.messages import trim_detail
from shoal.protocol.errors import InputError, ShoalError


class TaskFault(ShoalError):
    """The code of a task raised something; the text has its type, its message, and the file and line in that code."""


@contextmanager
def blame(module: str, passes: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Make a TaskFault of what is raised inside by the code of a task, which `module` or its package holds. An
    InputError tells a person what to do already, and passes, as what `passes` says is no fault of the task."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError | TaskFault) or passes(error):
            raise
        raise TaskFault(trim_detail(_tell(error, module.partition(".")[0]))) from error


def _tell(error: Exception, package: str) -> str:
    place = _find_place(error.__traceback__, package)
    message = " ".join(str(error).split())  # last: it may be so long that it is cut off
    return "".join((type(error).__name__, f" at {place}" if place else "", f": {message}" if message else ""))


def _find_place(trace: TracebackType | None, package: str) -> str:
    """`file:line` of the innermost frame in the package; empty where the error came up outside of it, as one of the
    backward pass does."""
    own = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(trace)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package
    ]
    return own[-1] if own else ""
