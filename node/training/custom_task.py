"""The user's own task by its import path: which paths there are, who allows one, and how its class is found.

The manifest names a class, `path = "package.module:Class"`; the person at each machine allows it by the same text
(`trainer.allow_tasks`), because training it is running its author's code there. Needs no torch, so that the daemon can
read the paths of its configuration.

Invariant: no module is imported whose path, letter by letter, is not among the allowed ones.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from shoal.node.training.task_faults import blame
from shoal.protocol.errors import ConfigError, ManifestError

CUSTOM = "custom"
ATTACHED = "attached"  # trained by a script of one's own: the path names the function that builds its model
PATH_BYTES_MAX = 256
PATH_FORM = "package.module:Class"
NEEDED = ("layout", "build_model", "open_data", "loss")

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_task_path(text: str) -> bool:
    """Whether it names a module and a class of it, in ASCII: what looks like an allowed path is that path."""
    return len(text) <= PATH_BYTES_MAX and _PATH.fullmatch(text) is not None


def take_path(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A custom task's path and its own options; raises ManifestError."""
    if "path" not in options:
        raise ManifestError("task.path", "is missing", f'add path = "{PATH_FORM}" to [task]')
    path = options["path"]
    if not isinstance(path, str) or not is_task_path(path):
        raise ManifestError("task.path", f"{path!r} names no class", f'write it as "{PATH_FORM}", in ASCII')
    return path, {name: value for name, value in options.items() if name != "path"}


def load_class(path: str, allowed: Sequence[str]) -> Any:
    """The class of an allowed path. Raises ConfigError where it is not allowed, ManifestError where there is no such
    class or it lacks a method of NEEDED, TaskFault where its module raises."""
    found = _load(path, allowed)
    if not isinstance(found, type):
        module, _, name = path.partition(":")
        raise ManifestError("task.path", f"{module} has no class {name}", "mend the name in the manifest's draft")
    if missing := [method for method in NEEDED if not callable(getattr(found, method, None))]:
        problem = f"{path} has no {', '.join(missing)}"
        raise ManifestError("task.path", problem, f"give the class the methods {', '.join(NEEDED)}")
    return found


def load_builder(path: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """The function of an allowed path that builds the model of an attached task; raises as `load_class` does."""
    found = _load(path, allowed)
    if not callable(found):
        module, _, name = path.partition(":")
        raise ManifestError("task.path", f"{module} has no function {name}", "mend the name in the manifest's draft")
    builder: Callable[..., Any] = found
    return builder


def _load(path: str, allowed: Sequence[str]) -> Any:
    if path not in allowed:
        line = f"allow_tasks = {json.dumps([*allowed, path])}"
        fix = f"look at that code; to run it here, write {line} under [trainer], or give --allow-task {path}"
        raise ConfigError("trainer.allow_tasks", f"does not allow {path}", fix)
    module, _, name = path.partition(":")
    try:
        with blame(module, lambda error: isinstance(error, ImportError)):
            return getattr(import_module(module), name, None)
    except ImportError as error:
        fix = "install the package that has it where shoal is installed, or name its folder in PYTHONPATH"
        raise ManifestError("task.path", f"{path} cannot be imported: {error}", fix) from error
