"""Whether others can dial this peer's tensor port: what each of its addresses is known to be good for, and why.

An address is a candidate until others have said what they found: a member that was asked and dialled it, or a link that
somebody has dialled. A word counts for VERDICT_LIFE_S, a newer one of the same member replaces it, and the majority
decides. Where it is even, an address that means the same machine everywhere is believed to be reachable (whoever failed
may have a bad line), and a private one is not (whoever came through may be next door).

No clock and no sockets in here: time is an argument, in seconds, monotonic.

Invariants: words about an address that is no candidate any more are forgotten at once; at most VERDICTS_MAX are kept of
each; `announced` never holds an address that members have found closed.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from shoal.node.endpoints import is_public
from shoal.node.link_port import Address
from shoal.protocol.identity import PeerId

VERDICT_LIFE_S = 900.0
VERDICTS_MAX = 16  # of each address


class ReachState(StrEnum):
    """Whether others can dial something: an address, the tensor port (as reachable as the best of its addresses), the
    control port."""

    UNKNOWN = "unknown"
    REACHABLE = "reachable"
    PRIVATE = "private"


class ReachReason(StrEnum):
    """Why the state is what it is."""

    NOT_ASKED = "not_asked"  # no member has said yet what it found
    NO_ADDRESS = "no_address"  # there is none that others could dial
    DIALLED_BACK = "dialled_back"  # a member was asked, dialled it and came through
    LINK_CAME_IN = "link_came_in"  # somebody dialled it of his own accord
    DIAL_BACK_FAILED = "dial_back_failed"  # members were asked, dialled it and did not come through


class NatMapping(StrEnum):
    """What the routers on the way make of the tensor port, as members see it."""

    UNKNOWN = "unknown"
    NONE = "none"  # they see the machine's own address
    ENDPOINT_INDEPENDENT = "endpoint_independent"  # everybody sees the same address: a hole can be punched
    ENDPOINT_DEPENDENT = "endpoint_dependent"  # each sees another one


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressReach:
    """One address and what is known of it."""

    address: Address
    state: ReachState
    reason: ReachReason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    reached: bool
    reason: ReachReason
    at_s: float


@dataclass(slots=True)
class _Candidate:
    verdicts: dict[PeerId, _Verdict] = field(default_factory=dict)

    def judge(self, address: Address, now: float) -> AddressReach:
        words = [one for one in self.verdicts.values() if now - one.at_s < VERDICT_LIFE_S]
        yes = [one for one in words if one.reached]
        no = len(words) - len(yes)
        if not words:
            return AddressReach(address=address, state=ReachState.UNKNOWN, reason=ReachReason.NOT_ASKED)
        if len(yes) > no or (len(yes) == no and is_public(address[0])):
            newest = max(yes, key=lambda one: one.at_s)
            return AddressReach(address=address, state=ReachState.REACHABLE, reason=newest.reason)
        return AddressReach(address=address, state=ReachState.PRIVATE, reason=ReachReason.DIAL_BACK_FAILED)


class Reachability:
    """The candidates in the order in which they are announced, and what members have found."""

    def __init__(self) -> None:
        self._candidates: dict[Address, _Candidate] = {}

    def set_candidates(self, addresses: tuple[Address, ...]) -> bool:
        """These and no others; whether they differ from those before. Who stays keeps what is known of it."""
        unique = tuple(dict.fromkeys(addresses))
        changed = unique != tuple(self._candidates)
        self._candidates = {one: self._candidates.get(one) or _Candidate() for one in unique}
        return changed

    def forget_before(self, at_s: float) -> None:
        """What was found before means nothing now."""
        for one in self._candidates.values():
            one.verdicts = {peer: word for peer, word in one.verdicts.items() if word.at_s >= at_s}

    @property
    def candidates(self) -> tuple[Address, ...]:
        return tuple(self._candidates)

    def note(self, address: Address, peer: PeerId, *, reached: bool, reason: ReachReason, now: float) -> None:
        """What `peer` found when it dialled `address`; nothing is noted of an address that is no candidate."""
        candidate = self._candidates.get(address)
        if candidate is None:
            return
        # Taken out first, so that the oldest stands first.
        candidate.verdicts.pop(peer, None)
        candidate.verdicts[peer] = _Verdict(reached=reached, reason=reason, at_s=now)
        if len(candidate.verdicts) > VERDICTS_MAX:
            del candidate.verdicts[next(iter(candidate.verdicts))]

    def describe(self, now: float) -> tuple[AddressReach, ...]:
        """Every candidate."""
        return tuple(one.judge(address, now) for address, one in self._candidates.items())

    def judge(self, now: float) -> tuple[ReachState, ReachReason]:
        """The state of the peer and the reason for it."""
        found = self.describe(now)
        for state in (ReachState.REACHABLE, ReachState.PRIVATE, ReachState.UNKNOWN):
            for one in found:
                if one.state is state:
                    return one.state, one.reason
        return ReachState.PRIVATE, ReachReason.NO_ADDRESS

    def announced(self, now: float) -> tuple[Address, ...]:
        """Where others should dial: what has been found open, then what nobody has tried yet."""
        found = self.describe(now)
        return tuple(
            one.address for state in (ReachState.REACHABLE, ReachState.UNKNOWN) for one in found if one.state is state
        )


def judge_mapping(own_hosts: tuple[str, ...], observed: tuple[Address, ...], port: int) -> NatMapping:
    """What the addresses say by which different members see one local port."""
    if not observed:
        return NatMapping.UNKNOWN
    if all(host in own_hosts and seen == port for host, seen in observed):
        return NatMapping.NONE
    if len(set(observed)) > 1:
        return NatMapping.ENDPOINT_DEPENDENT
    return NatMapping.ENDPOINT_INDEPENDENT if len(observed) > 1 else NatMapping.UNKNOWN
