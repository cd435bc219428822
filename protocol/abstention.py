"""What a voter may do whose disk has forgotten what it signed: nothing, until what it signed can do no harm.

A voter that lost its vote record could vote a second time where it has voted, and two quorums might then meet in nobody
but this voter. The record is of the round r after the newest head that this peer had. So it must sign nothing in r or
before, and nobody can tell it r.

What tells it: a certificate of some round j that was made since. The newest head of every peer is noted when that peer
is first heard after the loss. Let j be certified by voters that were all heard at head j-2 or before. Had this peer
signed anything after round j, it would have known a certificate of j; the quorum behind that one stood at head j-1 at
least, and meets the quorum behind this one in a voter other than this peer, which was heard further back than it was:
a contradiction, as heads never go back. So this peer signed nothing after j, and may sign from round j+1 on.
In a calm swarm that is two rounds after the one that was open.

Where every quorum needs this peer (two voters), that would never come. There any two quorums meet in another voter who
remembers, so this peer may go on at once, in attempts that it cannot have been in. A voter alone may not: nobody
else knows what it has certified. Then the swarm's owner has to speak (a re-root).

Where so many abstain that the others are no quorum, nobody can make the certificate that would end it. For the
declared timer (`reroot_after_s`) they therefore do not count as in sight, and those who remember go on without them.
Nothing more is given up than by any re-root: whoever abstains signs no declaration, and a certificate that only it knew
is lost.

What counts as heard: a presence may be gossiped for a while after it was signed, so within the first `window_s` the
newest counts and not the first.
"""

from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate, Presence
from shoal.protocol.quorum import QuorumRule, is_reroot, quorum_size

# What a presence says in place of the phase, so that others in the same position do not count on this peer's memory.
ABSTAINING = "abstain"
# Where such a voter goes on if it must: so many attempts of one round take hours to fail.
FRESH_ATTEMPT = 10_000
HEADS_MAX = 1024
# From the newest head that was heard: the round that is open there, one that only this peer may have known of, and on.
ROUNDS_LOST = 3


class Abstention:
    """From the loss until its end. A restart in between begins it anew, which loses time and nothing else."""

    def __init__(self, me: PeerId, now: float, window_s: float, *, lasts: bool = False) -> None:
        self.lasts = lasts  # for as long as this process lives: somebody else signs with the same key
        self._me = me
        self._settles_s = now + window_s
        self._heads: dict[PeerId, int] = {}
        self._forgetful: set[PeerId] = set()
        self.goes_on = False  # whether this peer signs all the same, because no quorum is possible without it

    def observe(self, presence: Presence, now: float) -> None:
        """A verified presence."""
        peer = presence.peer
        if presence.phase == ABSTAINING:
            self._forgetful.add(peer)
        else:
            self._forgetful.discard(peer)
        known = self._heads.get(peer)
        if known is None and len(self._heads) < HEADS_MAX:
            self._heads[peer] = presence.head_round
        elif known is not None and now < self._settles_s:
            self._heads[peer] = max(known, presence.head_round)

    def may_go_on(self, voters: tuple[PeerId, ...], rule: QuorumRule, now: float) -> bool:
        """Whether no quorum is possible without this peer, and all others are here and remember."""
        others = [peer for peer in voters if peer != self._me]
        needs_all = quorum_size(len(voters), rule) == len(voters)
        remember = all(peer in self._heads and peer not in self._forgetful for peer in others)
        return not self.lasts and bool(others) and needs_all and remember and now >= self._settles_s

    def is_over(self, certificate: Certificate, voters: tuple[PeerId, ...], rule: QuorumRule) -> bool:
        """Whether this certificate, of a round that these voters decided, was made after the loss."""
        if self.lasts or is_reroot(certificate):
            return False
        needed = quorum_size(len(voters), rule)
        liars_max = len(voters) - needed if rule is QuorumRule.TWO_THIRDS else 0
        others = {vote.voter for vote in certificate.votes} - {self._me}
        if len(others) + needed - len(voters) <= liars_max:
            return False  # another quorum may meet this one in this peer alone, or in liars
        heard = [self._heads.get(peer) for peer in others - self._forgetful]
        is_new = all(head is not None and head <= certificate.result.round - 2 for head in heard)
        return len(heard) == len(others) and is_new

    def until_round(self) -> int | None:
        """The round from which on this peer is likely to vote again; None while nobody was heard, or where it lasts."""
        return max(self._heads.values()) + ROUNDS_LOST if self._heads and not self.lasts else None
