"""Who goes on sending what must not be sent: one account for each peer, over both planes, and when it is full.

Two kinds of refusals are kept apart. What only a liar or a broken program can cause fills the account with LIES_MAX of
them. What honest peers cause too (the round has just ended, the same again after a reconnect, too early, no room, the
other side of a split swarm) is counted and costs next to nothing: only a flood fills the account, and how much is a
flood grows with the parts that a peer may have to send. What is not proven to come from a peer, such as bytes that fail
authentication, is held against nobody: whoever sits on the path could make an honest peer look like a liar.

A full account means: hung up on over both planes, refused for REFUSED_S, then another chance with an empty account.

No clock in here: time is an argument, in seconds, monotonic.

Invariants: a full account drains within WINDOW_S, so that what is rare never adds up; at most PEERS_MAX accounts are
kept; a refusal ends REFUSED_S after it began, however often the peer comes back meanwhile.
"""

from dataclasses import dataclass
from enum import Enum, auto

from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId

WINDOW_S = 60.0
LIES_MAX = 16  # at once; some more when they come slowly, for the account drains meanwhile
LATE_MAX = 2048  # at once, or 34 a second for long; a round takes some dozens of messages
# A sender that hears nothing of a round's end sends every part, and again a few times, round after round.
LATE_PER_PART_MAX = 64
REFUSED_S = 300.0
PEERS_MAX = 1024

_FULL = 1.0 - 1e-9

# What an honest peer can cause: it is late, early or restarted, its path is bad, or it is on another branch of the log.
HONEST = frozenset(
    {
        Refusal.WRONG_ROUND,
        Refusal.WRONG_ATTEMPT,
        Refusal.WRONG_BASE,
        Refusal.WRONG_PROPOSER,
        Refusal.OTHER_LOG,
        Refusal.BANNED,
        Refusal.NOT_ADMITTED,
        Refusal.NOT_A_MEMBER,
        Refusal.NO_QUORUM,
        Refusal.DUPLICATE,
        Refusal.REPLAYED,
        Refusal.MISSING_DEPENDENCY,
        Refusal.EXPIRED,
        Refusal.LIMIT,
        Refusal.NOT_READY,
        Refusal.NOT_AUTHENTIC,
        Refusal.BUDGET_SPENT,
    }
)


class Fault(Enum):
    """What a refusal says of the peer whose bytes were refused."""

    LIE = auto()
    LATE = auto()
    LATE_PART = auto()  # a frame of a tensor link: there are as many as the model has parts


def judge(refusal: Refusal) -> Fault:
    """What a message that was refused for this reason says of its sender."""
    return Fault.LATE if refusal in HONEST else Fault.LIE


@dataclass(slots=True)
class _Account:
    """`filled` is 1 when the peer has done enough; it drains by 1 in WINDOW_S."""

    filled: float
    as_of_s: float
    refused_until_s: float | None = None
    reason: Refusal = Refusal.LIMIT

    def drain(self, now: float) -> None:
        self.filled = max(0.0, self.filled - (now - self.as_of_s) / WINDOW_S)
        self.as_of_s = now


class Conduct:
    """The accounts of one daemon. It never accuses `me`."""

    def __init__(self, me: PeerId) -> None:
        self.me = me
        self._parts = 0
        self._accounts: dict[PeerId, _Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def expect_parts(self, parts: int) -> None:
        """The model has so many parts: that many late ones are one late peer."""
        self._parts = parts

    def note(self, peer: PeerId, refusal: Refusal, fault: Fault, now: float) -> bool:
        """Something of this peer was refused. True when that was one too many: hang up now."""
        if peer == self.me or self.refusal(peer, now) is not None:
            return False
        account = self._accounts.get(peer)
        if account is None:
            self._make_room(now)
            account = self._accounts[peer] = _Account(filled=0.0, as_of_s=now)
        account.drain(now)
        account.filled += self._cost(fault)
        if account.filled < _FULL:
            return False
        account.refused_until_s = now + REFUSED_S
        account.reason = refusal
        return True

    def refusal(self, peer: PeerId, now: float) -> Refusal | None:
        """Why this peer gets no connection now; None when it may have one."""
        account = self._accounts.get(peer)
        if account is None or account.refused_until_s is None:
            return None
        if now >= account.refused_until_s:
            del self._accounts[peer]
            return None
        return account.reason

    def list_refused(self, now: float) -> dict[PeerId, tuple[Refusal, float]]:
        """Every peer that is refused now: why, and for how many seconds more."""
        return {
            peer: (account.reason, account.refused_until_s - now)
            for peer, account in self._accounts.items()
            if account.refused_until_s is not None and account.refused_until_s > now
        }

    def _cost(self, fault: Fault) -> float:
        match fault:
            case Fault.LIE:
                return 1 / LIES_MAX
            case Fault.LATE:
                return 1 / LATE_MAX
            case Fault.LATE_PART:
                return 1 / (LATE_MAX + LATE_PER_PART_MAX * self._parts)

    def _make_room(self, now: float) -> None:
        """Forget whoever matters least: who has the emptiest account, and a refused peer only when all are."""
        if len(self._accounts) < PEERS_MAX:
            return
        for account in self._accounts.values():
            account.drain(now)
        least = min(self._accounts, key=lambda peer: _weigh(self._accounts[peer]))
        del self._accounts[least]


def _weigh(account: _Account) -> tuple[float, float]:
    return (account.refused_until_s or 0.0, account.filled)
