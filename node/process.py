"""What every process of ours begins with: an event loop, signals that ask it to leave, a log, and its share of the
machine."""

import asyncio
import gc
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

STDIN = 0
# Of CPython's collector, which by itself looks at what is new after 700 objects. Imports leave 180,000 of them for good
# and no garbage; benchmarks/RESULTS.md has what it took to look at them again and again.
OBJECTS_PER_COLLECTION = 20_000


def look_for_garbage_seldom() -> None:
    """Called before a program's imports, for the whole process."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)


def keep_all_objects() -> None:
    """What is there now is there for good: no collection goes through it again and holds the event loop up for it."""
    gc.freeze()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, for `asyncio.Runner`; None, which is asyncio's own, where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return None  # Windows
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Ctrl-C and SIGTERM leave gracefully; a second one does not wait for anybody."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)


def leave_with_stdin() -> None:
    """Leave as after SIGTERM when nobody holds the other end of standard input any more: whoever started this process
    has ended, be it by SIGKILL."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(STDIN, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"at": record.created, "level": record.levelname.lower(), "text": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_log(level: str, style: str) -> None:
    """The log goes to standard error, one line a record."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(_JsonFormatter() if style == "json" else text)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("shoal",):
        logging.getLogger(name).setLevel(level.upper())


def count_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
