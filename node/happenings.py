"""What a person may want to know of a running peer, one sentence each, and the feed that carries them to whoever looks.

Invariants: every failure has a remedy, which is told with it; the feed keeps the last HAPPENINGS_MAX happenings and at
most QUEUED_MAX for each reader, and a slow reader loses the oldest, never the daemon's time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from shoal.protocol.effects import AttemptFailed, Note, PartReassigned, SenderMissing
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId

HAPPENINGS_MAX = 64
QUEUED_MAX = 256


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class HappeningKind(StrEnum):
    ROUND_CERTIFIED = "round_certified"
    ATTEMPT_FAILED = "attempt_failed"
    PART_REASSIGNED = "part_reassigned"
    SENDER_MISSING = "sender_missing"
    PEER_JOINED = "peer_joined"
    PEER_LOST = "peer_lost"
    CATCH_UP = "catch_up"
    TRAINER = "trainer"
    NETWORK = "network"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """`at_s` is wall-clock time, `text` a sentence without its full stop."""

    at_s: float
    severity: Severity
    kind: HappeningKind
    text: str


# What is done about each failure: the second half of the sentence that people read.
REMEDIES: Mapping[Failure, str] = {
    Failure.PROPOSER_LOST: "the next proposer takes over",
    Failure.PROPOSER_SILENT: "the next proposer takes over",
    Failure.PROPOSER_ABSTAINS: "the next proposer takes over",
    Failure.EXCHANGE_TIMEOUT: "the next attempt begins with whoever is there",
    Failure.COMMIT_TIMEOUT: "the next attempt proposes again what may be certified already",
    Failure.NO_QUORUM: "training goes on until enough voters are back",
    Failure.UPDATE_LOST: "the voters that are left go on from the round before",
    Failure.TOO_FEW_READY: "the round waits for more peers",
    Failure.OWNER_LOST: "its parts go to other owners",
    Failure.OWNER_SLOW: "its parts go to other owners",
    Failure.SENDER_LOST: "the parts that it did not send are reduced without it",
    Failure.SENDER_SLOW: "the parts that it did not send are reduced without it",
    Failure.SUPERSEDED: "a later attempt goes on",
    Failure.PEER_LEFT: "the others go on",
    Failure.PEER_LOST: "the others go on",
    Failure.PEER_UNSEEN: "it is not counted on until it comes",
    Failure.PEER_UNREACHABLE: "its other addresses are tried, and relays",
    Failure.PEER_SLOW: "the others go on",
    Failure.NO_PARTNER: "training goes on, and others are asked again when it is ready",
    Failure.PARTNER_LOST: "training goes on, and others are asked again when it is ready",
    Failure.DONOR_FAILED: "another donor is asked",
    Failure.TRAINER_CRASHED: "it is started again from the last certified state",
    Failure.TRAINER_STALLED: "it is started again from the last certified state",
    Failure.BOOTSTRAP_UNREACHABLE: "the other bootstrap peers and the peer book are tried",
    Failure.CLOCK_SKEW: "rounds do not depend on it; mend the clock",
    Failure.DISK_FULL: "this peer does not vote until there is space",
    Failure.STORE_DAMAGED: "it is kept aside; what is whole of it stays, the rest comes from other peers",
    Failure.STORE_FOREIGN: "nothing is touched; give this peer a folder of its own",
    Failure.STORE_IN_USE: "nothing is touched; stop the other process or give this peer a folder of its own",
    Failure.STORE_UNUSABLE: "nothing is touched; mend the folder's permissions or the disk",
    Failure.STORE_BEHIND: "what is missing comes from other peers; this peer does not vote until that can do no harm",
    Failure.VOTES_FORGOTTEN: "it trains and contributes; the others certify without its vote",
    Failure.CHAIN_UNCONFIRMED: "it asks other peers where its chain ends, and then goes on",
    Failure.CHAIN_CLONED: "another process signs with this key; stop one of the two and give it a new identity",
    Failure.CHAIN_FORKED: "ask the swarm's owner to re-admit it, or start it with a new identity",
    Failure.NO_GATEWAY: "no port is mapped; it is looked for again",
    Failure.GATEWAY_SILENT: "no port is mapped; switch on UPnP or NAT-PMP in the router, or forward the ports by hand",
    Failure.GATEWAY_REFUSED: "no port is mapped; allow UPnP or NAT-PMP in the router, or forward the ports by hand",
    Failure.GATEWAY_MALFORMED: "no port is mapped; forward the ports by hand",
    Failure.PORT_TAKEN: "no port is mapped; remove old mappings in the router",
    Failure.DOUBLE_NAT: "a mapping would not help; put the outer router into bridge mode, or forward its ports, too",
    Failure.MULTICAST_UNAVAILABLE: "peers on the LAN are not found by themselves; others are",
    Failure.PUNCH_TIMEOUT: "a member is asked to relay",
    Failure.PUNCH_REFUSED: "a member is asked to relay",
    Failure.PUNCH_PAUSED: "a member is asked to relay",
    Failure.NO_OBSERVED_ADDRESS: "a member is asked to relay",
    Failure.NO_RELAY: "what it holds is fetched from others",
    Failure.RELAY_REFUSED: "another member is asked, or the same one later",
    Failure.RELAY_LOST: "another member is asked, or the same one later",
    Failure.RELAY_TIMEOUT: "another member is asked, or the same one later",
    Failure.RELAY_PAUSED: "what it holds is fetched from others",
    Failure.RELAY_HALF_OPEN: "the two ask another member",
    Failure.RELAY_IDLE: "the two ask again when they need it",
    Failure.RELAY_EXPIRED: "the two ask again when they need it",
    Failure.BUDGET_SPENT: "the two ask another member; within an hour this one relays again",
}


def describe_notes(notes: Iterable[Note], name: Callable[[PeerId], str], at_s: float) -> list[Happening]:
    """The failures among a core's notes. Alike notes about several parts of a round become one happening."""
    counts: dict[tuple[HappeningKind, str], int] = {}
    for note in notes:
        match note:
            case AttemptFailed():
                who = f" ({name(note.peer)})" if note.peer is not None else ""
                told = f"attempt {note.attempt + 1} of round {note.round} failed: {note.reason}{who}"
                key = HappeningKind.ATTEMPT_FAILED, f"{told}; {REMEDIES[note.reason]}"
            case PartReassigned():
                told = (
                    f"of round {note.round} went from {name(note.old_owner)} to {name(note.new_owner)}: {note.reason}"
                )
                key = HappeningKind.PART_REASSIGNED, told
            case SenderMissing():
                told = f"of round {note.round} reduced without {name(note.peer)}: {note.reason}"
                key = HappeningKind.SENDER_MISSING, told
            case _:
                continue
        counts[key] = counts.get(key, 0) + 1
    return [
        Happening(at_s=at_s, severity=Severity.WARNING, kind=kind, text=_count_parts(kind, text, count))
        for (kind, text), count in counts.items()
    ]


def _count_parts(kind: HappeningKind, text: str, count: int) -> str:
    if kind is HappeningKind.ATTEMPT_FAILED:
        return text
    return f"{count} part{'s' if count > 1 else ''} {text}"


class Reader:
    """One reader's end of the feed."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Happening] = asyncio.Queue(QUEUED_MAX)
        self.dropped = 0

    async def next(self) -> Happening:
        """The next happening after those that were read or dropped."""
        return await self._queue.get()

    def _put(self, happening: Happening) -> None:
        if self._queue.full():
            self._queue.get_nowait()
            self.dropped += 1
        self._queue.put_nowait(happening)


class HappeningFeed:
    """The newest happenings, and those to come. Lives on one event loop."""

    def __init__(self) -> None:
        self._recent: deque[Happening] = deque(maxlen=HAPPENINGS_MAX)
        self._readers: set[Reader] = set()

    def publish(self, *happenings: Happening) -> None:
        """Never waits."""
        for happening in happenings:
            self._recent.append(happening)
            for reader in self._readers:
                reader._put(happening)

    @property
    def recent(self) -> tuple[Happening, ...]:
        """The oldest first."""
        return tuple(self._recent)

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """What happens from now on, while the context lasts."""
        reader = Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
