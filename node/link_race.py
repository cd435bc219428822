"""Happy eyeballs (RFC 8305): several addresses of one peer are tried with a head start each, and the first link that
has proven its peer wins.

Invariant: when `race` returns or raises, every other attempt has been cancelled and has ended.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from shoal.node.endpoints import interleave, parse_ip
from shoal.node.link_port import Address, LinkEnd, LinkLost

T = TypeVar("T")
Way = TypeVar("Way")


def _is_never_final(lost: LinkLost) -> bool:
    """Whatever one way has come to, another may lead there."""
    return False


async def race(
    ways: Sequence[Way],
    dial: Callable[[Way], Awaitable[T]],
    head_start_s: float,
    discard: Callable[[T], None],
    is_final: Callable[[LinkLost], bool] = _is_never_final,
) -> T:
    """What the first successful `dial` returns; raises the LinkLost that says most when all have failed, or one that
    `is_final` as soon as it comes.

    The next way, as a rule an address, is tried when the one before has failed, or after its head start. `discard` gets
    what another attempt has returned at the same moment; one that is cancelled has to clean up after itself.
    """
    assert ways, "somewhere to dial"
    left = list(reversed(ways))
    running: list[asyncio.Task[T]] = []
    failures: list[LinkLost] = []
    try:
        while left or running:
            if left:
                running.append(asyncio.ensure_future(_run(dial, left.pop())))
            done, _ = await asyncio.wait(
                running, timeout=head_start_s if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in [one for one in running if one in done]:
                running.remove(attempt)
                try:
                    return attempt.result()
                except LinkLost as error:
                    if is_final(error):
                        raise
                    failures.append(error)
    finally:
        for attempt in running:
            attempt.cancel()
        for late in await asyncio.gather(*running, return_exceptions=True):
            if not isinstance(late, BaseException):
                discard(late)
    # Whoever answered and refused says more than an address at which nobody answers.
    raise min(failures, key=lambda lost: lost.reason is LinkEnd.UNREACHABLE)


async def resolve(addresses: Sequence[Address], count_max: int, timeout_s: float) -> list[Address]:
    """The IP addresses behind `addresses`, interleaved, at most `count_max`; names that do not resolve are left out."""
    found: list[Address] = []
    for address in addresses[:count_max]:
        found += [address] if parse_ip(address[0]) is not None else await _look_up(address, timeout_s)
    return interleave(found)[:count_max]


async def _run(dial: Callable[[Way], Awaitable[T]], way: Way) -> T:
    return await dial(way)


async def _look_up(address: Address, timeout_s: float) -> list[Address]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            rows = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        return []
    return [(str(row[4][0]), address[1]) for row in rows]
