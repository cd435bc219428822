"""Which certificates count, and the credit that follows from them.

The certificate of round r counts when it names the result of round r-1 as the one before it and a quorum of the voters
that stand in that result has signed it (protocol.quorum); round 1 follows the manifest. Who wrote it into the ledger,
and when, says nothing: a certificate proves itself. So what counts is a function of the set of certificates alone, and
only grows.

Where a re-root has parted the log, the side with more certified tokens since then stands, as in protocol.lineage. Two
results of one round without a re-root are never a choice: a quorum has lied, nothing counts from there on, and the
round is named.

Credit is derived: the tokens of a member whose contribution is in at least one part, and how many such rounds there
were. Nobody reports its own.

Rounds may be settled: then they are summed up in one `ChainBase` (round, digest, voters, credit), and certificates up
to it are looked at no more.
"""

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from blake3 import blake3

from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.lineage import Weight
from shoal.protocol.messages import VOTERS_MAX, Certificate, Peer, Result, Vote, digest_record, verify_message
from shoal.protocol.quorum import Authority, Head, check_certificate, is_reroot
from shoal.protocol.wire import (
    ARRAY_ITEMS_MAX,
    DELTA_BYTES_MAX,
    U63,
    Bound,
    Bytes32,
    decode_record_untrusted,
    encode_record,
)

# A record of this many peers is read in one piece. Beyond, those with the fewest rounds are forgotten at era's end.
CREDIT_PEERS_MAX = ARRAY_ITEMS_MAX
VOTES_REMEMBERED_MAX = 16_384
TOKENS_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What a peer's certified work amounts to."""

    tokens: U63
    rounds: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRecord:
    peer: Peer
    credit: Credit


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainBase:
    """Everything up to a certified round, summed up. Round 0 is the manifest: its digest is the swarm's id."""

    round: U63
    digest: Bytes32
    voters: Annotated[tuple[Peer, ...], Bound(0, VOTERS_MAX)]
    credit: Annotated[tuple[CreditRecord, ...], Bound(0, CREDIT_PEERS_MAX)] = ()

    def encode(self) -> bytes:
        """Canonical bytes, to be stored."""
        return encode_record(self)


def decode_base_untrusted(raw: bytes) -> ChainBase:
    """Inverse of `ChainBase.encode`; raises ProtocolError."""
    return decode_record_untrusted(ChainBase, raw, 4 * DELTA_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedRound:
    """The newest round that counts."""

    round: U63
    digest: Bytes32


@dataclass(slots=True, kw_only=True)
class _Link:
    """A certified result. `values`: of the certificates for it the one with the lowest hash, and apart from it the one
    that is a re-root."""

    result: Result
    digest: bytes
    values: dict[bool, tuple[bytes, bytes]]
    children: list[bytes]

    @property
    def is_reroot(self) -> bool:
        return False not in self.values

    @property
    def value(self) -> bytes:
        return self.values[self.is_reroot][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A certificate that follows nothing that is known yet; as bytes, which take a fraction of the memory."""

    value: bytes
    era: int


class CertifiedChain:
    """The certificates of one ledger. `add` takes them in any order and any number of times; what waits for its round's
    predecessor is bounded by the entries that the ledger holds.

    `authority` None: a swarm without rounds, in which no certificate counts. `rounds_per_era`: at these rounds credit
    is cut to CREDIT_PEERS_MAX, and only at these may rounds be settled.
    """

    def __init__(self, *, authority: Authority | None, base: ChainBase, rounds_per_era: int) -> None:
        self._authority = authority
        self._rounds_per_era = rounds_per_era
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        # The BLAKE3 hashes of certificates whose signatures the caller has checked itself.
        self.trusted: Container[bytes] = ()
        # Grows with every change.
        self.revision = 0
        self._begin(base)

    def _begin(self, base: ChainBase) -> None:
        self._base = base
        self._links: dict[bytes, _Link] = {}
        self._roots: list[bytes] = []
        self._waiting: dict[bytes, dict[bytes, _Waiting]] = {}
        self._path: list[_Link] = []
        self._credit = {record.peer: record.credit for record in base.credit}
        self._contradiction: int | None = None
        self._newest_round = base.round
        self.revision += 1

    @property
    def base(self) -> ChainBase:
        """What stands before the certificates that are held."""
        return self._base

    @property
    def head(self) -> CertifiedRound:
        """The newest round that counts."""
        if self._path:
            return CertifiedRound(round=self._path[-1].result.round, digest=self._path[-1].digest)
        return CertifiedRound(round=self._base.round, digest=self._base.digest)

    @property
    def newest_round(self) -> int:
        """The highest round with a certificate that follows, on whichever side of a parting; it never falls."""
        return self._newest_round

    @property
    def contradiction(self) -> int | None:
        """The round of which a quorum has certified two results without a re-root; nothing counts from it on."""
        return self._contradiction

    @property
    def credit(self) -> Mapping[PeerId, Credit]:
        """Of every peer, up to `head`."""
        return self._credit

    def follows(self, result_digest: bytes) -> bool:
        """Whether this result is known to follow, on whichever side of a parting."""
        return result_digest in self._links

    def list_certificates(self, after: int) -> dict[int, bytes]:
        """The certificates that count, of the rounds above `after`."""
        return {link.result.round: link.value for link in self._path if link.result.round > after}

    def add(self, round_number: int, value: bytes, era: int) -> None:
        """Take in what was written for a round, in an entry of this era."""
        if self._authority is None or round_number <= self._base.round:
            return
        try:
            certificate = decode_record_untrusted(Certificate, value, DELTA_BYTES_MAX)
        except ProtocolError:
            return
        if certificate.result.round == round_number:
            self._judge(certificate, value, era)

    def truncate(self, round_number: int, oldest_era: int) -> None:
        """Sum up the rounds up to this one, where it counts; it is the last one of an era. What waits for a round
        before it, and was written in an era before `oldest_era`, is forgotten."""
        assert round_number % self._rounds_per_era == 0, "rounds are settled by eras"
        base = self._base
        if base.round < round_number <= self.head.round:
            base = _sum_up(
                base, [link.result for link in self._path[: round_number - base.round]], self._rounds_per_era
            )
        links, waiting = self._links, self._waiting
        self._begin(base)
        self._roots = [link.digest for link in links.values() if link.result.previous == base.digest]
        kept = list(self._roots)
        while kept:
            link = links[kept.pop()]
            self._links[link.digest] = link
            self._newest_round = max(self._newest_round, link.result.round)
            kept += link.children
        for parent, values in waiting.items():
            young = {mark: one for mark, one in values.items() if one.era >= oldest_era}
            if young:
                self._waiting[parent] = young
        self._choose_path()

    def _judge(self, certificate: Certificate, value: bytes, era: int) -> None:
        released = [_Waiting(value=value, era=era)]
        while released:
            one = released.pop()
            if one.value is not value:
                certificate = decode_record_untrusted(Certificate, one.value, DELTA_BYTES_MAX)
            result = certificate.result
            follows_base = result.previous == self._base.digest and result.round == self._base.round + 1
            parent = self._links.get(result.previous)
            if parent is None and not follows_base:
                waiting = self._waiting.setdefault(result.previous, {})
                mark = blake3(one.value).digest()
                waiting[mark] = max(one, waiting.get(mark, one), key=lambda other: other.era)
            elif self._admit(certificate, one.value, parent):
                released += self._waiting.pop(digest_record(result), {}).values()

    def _admit(self, certificate: Certificate, value: bytes, parent: _Link | None) -> bool:
        """Whether the certificate's result is in the chain of `parent` for the first time."""
        digest, kind, mark = digest_record(certificate.result), is_reroot(certificate), blake3(value).digest()
        known = self._links.get(digest)
        if known is not None and kind in known.values and known.values[kind][0] <= mark:
            return False
        assert self._authority is not None, "certificates are judged by somebody's word"
        result = certificate.result
        number, voters = (
            (parent.result.round, parent.result.voters) if parent else (self._base.round, self._base.voters)
        )
        # Nobody can tell state roots without the model; the round's voters have compared them.
        head = Head(round=number, digest=result.previous, state_root=result.base_root, voters=voters)
        try:
            verify = _take_word if mark in self.trusted else self._verify
            check_certificate(certificate, head, self._authority, verify)
        except ProtocolError:
            return False
        if known is not None:
            self.revision += 1
            was_reroot = known.is_reroot
            known.values[kind] = mark, value
            if known.is_reroot is not was_reroot:
                self._choose_path()
            return False
        self._links[digest] = _Link(result=result, digest=digest, values={kind: (mark, value)}, children=[])
        self.revision += 1
        siblings = parent.children if parent else self._roots
        siblings.append(digest)
        self._newest_round = max(self._newest_round, result.round)
        if len(siblings) == 1 and result.previous == self.head.digest:
            self._extend_path(self._links[digest])
        else:
            self._choose_path()
        return True

    def _verify(self, voter: PeerId, swarm: bytes, vote: Vote) -> None:
        mark = digest_record(vote)
        if mark not in self._verified:
            verify_message(voter, swarm, vote)
            self._verified[mark] = None
            if len(self._verified) > VOTES_REMEMBERED_MAX:
                self._verified.popitem(last=False)

    def _extend_path(self, link: _Link) -> None:
        self._path.append(link)
        self._credit = _add_credit(self._credit, link.result, self._rounds_per_era)

    def _choose_path(self) -> None:
        """Go through all links anew and take the heavier side wherever the log has parted."""
        weights: dict[bytes, Weight] = {}
        for link in sorted(self._links.values(), key=lambda one: -one.result.round):
            following = self._follow(link.children, weights)
            rest = weights.get(following) if following else None
            own = sum(tokens for _, tokens in list_credited(link.result))
            weights[link.digest] = Weight(
                tokens=own + (rest.tokens if rest else 0),
                rounds=1 + (rest.rounds if rest else 0),
                last_digest=rest.last_digest if rest else link.digest,
            )
        self._path = []
        self._credit = {record.peer: record.credit for record in self._base.credit}
        self._contradiction = None
        siblings = self._roots
        while (digest := self._follow(siblings, weights)) is not None:
            self._extend_path(self._links[digest])
            siblings = self._links[digest].children
        if siblings:
            self._contradiction = self.head.round + 1

    def _follow(self, siblings: Sequence[bytes], weights: Mapping[bytes, Weight]) -> bytes | None:
        if sum(not self._links[digest].is_reroot for digest in siblings) > 1:
            return None
        return max(siblings, key=lambda digest: weights[digest], default=None)


def _take_word(voter: PeerId, swarm: bytes, vote: Vote) -> None:
    """For the votes of a certificate that was checked before."""


def list_credited(result: Result) -> tuple[tuple[PeerId, int], ...]:
    """The members whose work is in the result, each with its tokens."""
    included = 0
    for part in result.parts:
        included |= int.from_bytes(part.contributors, "little")
    return tuple((member.peer, member.tokens) for index, member in enumerate(result.members) if included >> index & 1)


def extend_base(base: ChainBase, certificates: Sequence[Certificate], rounds_per_era: int) -> ChainBase:
    """`base` after these rounds, consecutive ones of one log, which the caller has checked."""
    return _sum_up(base, [certificate.result for certificate in certificates], rounds_per_era)


def _sum_up(base: ChainBase, results: Sequence[Result], rounds_per_era: int) -> ChainBase:
    credit = {record.peer: record.credit for record in base.credit}
    digest, voters, number = base.digest, base.voters, base.round
    for result in results:
        assert (result.previous, result.round) == (digest, number + 1), "consecutive rounds of one log"
        credit = _add_credit(credit, result, rounds_per_era)
        digest, voters, number = digest_record(result), result.voters, result.round
    return ChainBase(round=number, digest=digest, voters=voters, credit=list_credit(credit))


def list_credit(credit: Mapping[PeerId, Credit]) -> tuple[CreditRecord, ...]:
    """Credit as records, by peer."""
    return tuple(CreditRecord(peer=peer, credit=one) for peer, one in sorted(credit.items()))


def _add_credit(credit: dict[PeerId, Credit], result: Result, rounds_per_era: int) -> dict[PeerId, Credit]:
    for peer, tokens in list_credited(result):
        had = credit.get(peer, Credit(tokens=0, rounds=0))
        credit[peer] = Credit(tokens=min(TOKENS_MAX, had.tokens + tokens), rounds=had.rounds + 1)
    if result.round % rounds_per_era == 0 and len(credit) > CREDIT_PEERS_MAX:
        ranked = sorted(credit.items(), key=lambda item: (-item[1].rounds, -item[1].tokens, item[0]))
        return dict(ranked[:CREDIT_PEERS_MAX])
    return credit
