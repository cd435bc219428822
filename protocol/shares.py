"""Who reduces how much: slow is not dead, so an owner that misses its deadlines is given fewer parts, then none.

A miss is a round in which a live owner was too slow and a part of its was given to another. Every member sees that in
the plan's revisions, and every proposer plans by what it saw itself; members only check that owners can be owners.

A slow line is given less from the beginning, so that the slow and the fast have sent everything at about the same time.

Invariants: a peer without a share still contributes; it gets another chance after PROBATION_ROUNDS; as long as anybody
can own parts, somebody does; memory is bounded by PEERS_MAX.
"""

from collections.abc import Mapping

from shoal.protocol.identity import PeerId

PEERS_MAX = 1024
MISSES_TO_SHRINK = 2
MISSES_TO_STOP = 3
SMALL_SHARE = 0.25
PROBATION_ROUNDS = 8


class Shares:
    """Misses in a row, by peer."""

    def __init__(self) -> None:
        self._misses: dict[PeerId, int] = {}
        self._stopped_at: dict[PeerId, int] = {}

    def note_round(self, round_number: int, owners: frozenset[PeerId], slow: frozenset[PeerId]) -> None:
        """A round is over: these peers owned parts in it, and those of them were too slow."""
        for peer in sorted(owners - slow):
            if self._misses.get(peer, 0) <= MISSES_TO_SHRINK:
                self._misses.pop(peer, None)
        for peer in sorted(slow):
            if len(self._misses) >= PEERS_MAX and peer not in self._misses:
                self._forget(next(iter(self._misses)))
            self._misses[peer] = min(self._misses.get(peer, 0) + 1, MISSES_TO_STOP)
            if self._misses[peer] == MISSES_TO_STOP:
                self._stopped_at[peer] = round_number
        for peer in [peer for peer, at in self._stopped_at.items() if round_number >= at + PROBATION_ROUNDS]:
            del self._stopped_at[peer]
            self._misses[peer] = MISSES_TO_SHRINK

    def share(self, peer: PeerId) -> float:
        """1 for an owner that keeps up, less for one that does not, 0 for one that is to own nothing."""
        misses = self._misses.get(peer, 0)
        if misses >= MISSES_TO_STOP:
            return 0.0
        return SMALL_SHARE if misses >= MISSES_TO_SHRINK else 1.0

    def _forget(self, peer: PeerId) -> None:
        del self._misses[peer]
        self._stopped_at.pop(peer, None)


def balance_uploads(speeds: Mapping[PeerId, float], members: int, update_ratio: float) -> dict[PeerId, float]:
    """Each owner's share beside an even one, 1, so that all owners have sent everything at the same time.

    `speeds` are the owners' upload rates beside one another, above 0, `members` how many contribute, `update_ratio` the
    size of an encoded update by that of a contribution. With the share s of the parts an owner sends (1 - s) of its
    contribution and, to everybody else, s of the update; who has sent its contribution last of all owns nothing."""
    growth = (members - 1) * update_ratio - 1.0  # of what an owner sends, in contributions, from no part to all
    if growth <= 0.0 or len(set(speeds.values())) < 2:
        return dict.fromkeys(speeds, 1.0)
    fastest_first = sorted(speeds, key=lambda peer: (-speeds[peer], peer))
    count, rate = len(fastest_first), sum(speeds.values())
    while speeds[fastest_first[count - 1]] * (growth + count) < rate:  # over before the others with nothing to own
        count -= 1
        rate -= speeds[fastest_first[count]]
    end = (growth + count) / rate
    return {peer: max(0.0, (end * speeds[peer] - 1.0) / growth) * len(speeds) for peer in speeds}


def assign_parts(order: tuple[PeerId, ...], shares: Mapping[PeerId, float], parts: int) -> tuple[PeerId, ...]:
    """The owner of every part: in turn, and in proportion to the shares (smooth weighted round robin).

    Of n peers with a share none has a whole part too many, and none lacks more than 1/2 + 1/3 + ... + 1/n of one: the
    mean credit of the k with the most grows only when somebody with as much credit as they is served, and then by
    1/(k + 1) at most. A small share gets its first part early, so that who is slow can show that it no longer is.
    """
    able = [peer for peer in order if shares.get(peer, 1.0) > 0.0] or list(order)
    weights = [shares.get(peer, 1.0) or 1.0 for peer in able]
    total = sum(weights)
    credit = [0.0] * len(able)
    owners = []
    for _ in range(parts):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = max(range(len(able)), key=lambda index: (credit[index], -index))
        credit[best] -= total
        owners.append(able[best])
    return tuple(owners)
