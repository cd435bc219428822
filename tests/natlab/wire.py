"""A cable with delay, loss and a limited rate, for kernels without netem.

Two TAP devices, one at each end, and a thread that carries frames from one to the other when their time has come. The
devices belong to the open files, so they are gone with the program, however it ends.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from dataclasses import dataclass

from tests.natlab.namespace import Namespace

# From linux/if_tun.h: TUNSETIFF, TUNSETOFFLOAD; IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; checksums, TCP over IPv4 and IPv6.
SET_INTERFACE, SET_OFFLOAD = 0x400454CA, 0x400454D0
TAP_WITHOUT_HEADER, WITH_SEGMENT_HEADER = 0x0002 | 0x1000, 0x4000
OFFLOADS = 1 | 2 | 4
FRAME_BYTES_MAX = 1 << 17
SEGMENT_BYTES = 1514  # the longest frame of a plain network
HEADERS_BYTES = 66  # Ethernet, IPv4, TCP with timestamps
QUEUE_S_MAX = 0.5  # what would wait longer for the line is dropped, as in a router
WAIT_S_MAX = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """One way; both ways are alike. `loss` is a share of the frames; no `bytes_per_s` means no limit.

    `segmented`: frames as long as those of a real cable. Without it the kernel hands over some dozens of them at once,
    as it does to a fast network card, so that this program can carry a Gbit/s; a loss would be of all of them.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = float("inf")
    segmented: bool = True


class Wire:
    """One cable. Its impairment may be changed while it is in use; `cut` lets nothing pass and tells nobody."""

    def __init__(self, near: Namespace, near_link: str, far: Namespace, far_link: str, impairment: Impairment) -> None:
        self.impairment = impairment
        self.is_cut = False
        self.carried = 0
        self.lost = 0
        self._entropy = random.Random(5)
        assert impairment.segmented or not impairment.loss, "what is lost is one frame"
        segmented = impairment.segmented
        self._ends = [
            near.call(lambda: _open_tap(near_link, segmented)),
            far.call(lambda: _open_tap(far_link, segmented)),
        ]
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._woken)
        self._thread.join()
        for descriptor in (*self._ends, self._wake):
            os.close(descriptor)

    def _carry(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        free_s = dict.fromkeys(self._ends, 0.0)
        number = 0
        while True:
            wait_s = WAIT_S_MAX if not under_way else max(0.0, under_way[0][0] - time.monotonic())
            readable, _, _ = select.select([*self._ends, self._wake], [], [], wait_s)
            if self._wake in readable:
                return
            now_s = time.monotonic()
            for end in readable:
                frame = os.read(end, FRAME_BYTES_MAX)
                leaves_s = max(free_s[end], now_s) + _count_bytes(frame) / self.impairment.bytes_per_s
                late = leaves_s - now_s > QUEUE_S_MAX
                if self.is_cut or late or self._entropy.random() < self.impairment.loss:
                    self.lost += 1
                    continue
                free_s[end] = leaves_s
                number += 1
                other = self._ends[1] if end == self._ends[0] else self._ends[0]
                heapq.heappush(under_way, (leaves_s + self.impairment.delay_s, number, other, frame))
            while under_way and under_way[0][0] <= now_s:
                _, _, other, frame = heapq.heappop(under_way)
                self._deliver(other, frame)

    def _deliver(self, end: int, frame: bytes) -> None:
        try:
            os.write(end, frame)
            self.carried += 1
        except OSError:  # the link is down, or its device is deleted
            self.lost += 1


def _count_bytes(frame: bytes) -> int:
    """What a line carries of it: one frame, or the several that it is cut into, each with headers of its own."""
    return len(frame) + (len(frame) - 1) // SEGMENT_BYTES * HEADERS_BYTES


def _open_tap(link: str, segmented: bool) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = TAP_WITHOUT_HEADER if segmented else TAP_WITHOUT_HEADER | WITH_SEGMENT_HEADER
    fcntl.ioctl(descriptor, SET_INTERFACE, struct.pack("16sH22x", link.encode(), flags))
    if not segmented:
        fcntl.ioctl(descriptor, SET_OFFLOAD, OFFLOADS)
    return descriptor
