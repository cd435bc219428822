"""What torch can use here: `python -m shoal.node.training.torch_check`, a child process of `shoal doctor`.

It prints one JSON object and ends; importing torch takes seconds and may fail in ways that only a process contains.
"""

import json
import sys
from typing import Any


def main() -> int:
    """Exit code 0, whatever it finds."""
    print_line(look())
    return 0


def print_line(found: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(found) + "\n")


def look() -> dict[str, Any]:
    """The version, and the devices or why there are none."""
    found: dict[str, Any] = {"version": "", "cuda_built": False, "devices": [], "cuda_fault": "", "fault": ""}
    try:
        import torch
    except ModuleNotFoundError as error:
        found["fault"] = "" if error.name == "torch" else str(error)
        return found
    except (ImportError, OSError, RuntimeError) as error:
        found["fault"] = str(error).splitlines()[0] if str(error) else type(error).__name__
        return found
    found["version"] = str(torch.__version__)
    found["cuda_built"] = torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None
    if not found["cuda_built"]:
        return found
    try:
        for index in range(torch.cuda.device_count()):
            # Allocating is the proof: a device may be listed and unusable.
            torch.zeros(1, device=f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
            found["devices"].append({"name": torch.cuda.get_device_name(index), "total": total, "free": free})
    except (RuntimeError, AssertionError) as error:
        found["cuda_fault"] = str(error).splitlines()[0] if str(error) else type(error).__name__
        found["devices"] = []
    return found


if __name__ == "__main__":
    sys.exit(main())
