"""How much memory this machine has, as far as this process may take of it."""

from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_TABLE = Path("/proc/self/cgroup")
# Where a control group's limit stands: of version 2, whose line in the table names no controller, and of version 1.
_LIMITS = {"": (_GROUPS, "memory.max"), "memory": (_GROUPS / "memory", "memory.limit_in_bytes")}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """`total_bytes` is what the machine has, or its container; `available_bytes` what is to be had now, with what the
    system can swap out."""

    total_bytes: int
    available_bytes: int


def see_memory() -> MachineMemory:
    """Blocking, but not for long."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit_bytes = min(find_limits(_read(_TABLE)), default=memory.total)
    return MachineMemory(
        total_bytes=min(memory.total, limit_bytes), available_bytes=min(memory.available + swap.free, limit_bytes)
    )


def find_limits(table: str) -> list[int]:
    """The limits on the memory of the control groups in a table like /proc/self/cgroup, and of those that they are in.
    In a container the paths of the table may not be there, and the container's own group stands at the top."""
    found = []
    for line in table.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            top, file = _LIMITS.get(name, (None, ""))
            if top is None:
                continue
            group = top / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (text := _read(folder / file).strip()).isdigit():
                    found.append(int(text))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
