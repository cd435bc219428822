"""Clients that mean ill, many at once, as a process: `python -m tests.e2e.hostile_clients COUNT HOST:PORT…`

Each of them is one of KINDS, and comes again PAUSE_S after it was hung up on. They come from many addresses of the
loopback network, so that limits for one address do not end it all. Ends when its standard input does, and then prints
one JSON object: how often each kind came, and how often it was hung up on.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

PAUSE_S = 1.0
SLOW_S = 1.0  # from one byte to the next
ADDRESSES = 50
SILENT, SLOW, OVERSIZED, MALFORMED = KINDS = ("silent", "slow", "oversized", "malformed")
OPENING = b"\x13/multistream/1.0.0\n"
# A line of four gigabytes; on the tensor port the first bytes of a handshake that never fits.
HUGE = b"\xff\xff\xff\xff\x0f" + bytes(4096)


async def come_again(index: int, host: str, port: int, counts: Counter[str]) -> None:
    """One client, until it is cancelled."""
    kind = KINDS[index % len(KINDS)]
    source = f"127.0.{1 + index // 250 % 4}.{2 + index % ADDRESSES}"
    while True:
        writer: asyncio.StreamWriter | None = None
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0))
            counts[kind] += 1
            await misbehave(kind, reader, writer)
            counts[f"{kind} hung up on"] += 1
        if writer is not None:
            writer.close()
        await asyncio.sleep(PAUSE_S)


async def misbehave(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the other side hangs up."""
    if kind == OVERSIZED:
        writer.write(OPENING + HUGE)
    elif kind == MALFORMED:
        writer.write(os.urandom(2048))
    elif kind == SLOW:
        for byte in OPENING * 100:
            writer.write(bytes((byte,)))
            with suppress(TimeoutError):
                async with asyncio.timeout(SLOW_S):
                    if await reader.read(4096) == b"":
                        return
    while await reader.read(4096):
        pass


async def flood(count: int, targets: Sequence[tuple[str, int]]) -> Counter[str]:
    """All of them, until the standard input ends."""
    counts: Counter[str] = Counter()
    # Not the kind's own step: each kind comes to each port.
    clients = [
        asyncio.create_task(come_again(index, *targets[index // len(KINDS) % len(targets)], counts))
        for index in range(count)
    ]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return counts


class Flood:
    """A flood that runs; `counts` is there when it is over."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}


@contextmanager
def open_flood(count: int, targets: Sequence[tuple[str, int]]) -> Iterator[Flood]:
    """The clients in a process of their own, for as long as the context lasts."""
    words = [f"{host}:{port}" for host, port in targets]
    command = [sys.executable, "-P", "-m", "tests.e2e.hostile_clients", str(count), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    running = Flood()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        try:
            yield running
        finally:
            told, _ = process.communicate(timeout=60)
            running.counts = json.loads(told)


def main(arguments: Sequence[str]) -> int:
    """The child process."""
    count, words = int(arguments[0]), arguments[1:]
    targets = [(word.rpartition(":")[0], int(word.rpartition(":")[2])) for word in words]
    print(json.dumps(asyncio.run(flood(count, targets))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
