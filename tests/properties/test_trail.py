"""The trail over dropped certificates: whoever knows the manifest alone gets to the true head, and to nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.node.certificate_trail import CertificateTrail
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.lineage import check_stretch
from shoal.protocol.messages import Certificate, Checkpoint, digest_record
from shoal.protocol.quorum import REROOT_ATTEMPT, Authority, QuorumRule, quorum_size
from shoal.protocol.trail import Anchor, blocking_size, check_trail
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import certify, make_result

SWARM = b"s" * 32
OWNER = Identity(b"o" * 32)
LIARS = [Identity(bytes([200 + number]) * 32) for number in range(3)]
HONEST = [Identity(bytes([number + 1]) * 32) for number in range(8)]
STRANGERS = [Identity(bytes([100 + number]) * 32) for number in range(3)]
IDENTITY_OF = {one.peer: one for one in (*HONEST, *LIARS, *STRANGERS, OWNER)}
ROUNDS_MAX = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A log as it was, with any change of voters between any two rounds."""

    authority: Authority
    founders: tuple[PeerId, ...]
    log: tuple[Certificate, ...]

    @property
    def genesis(self) -> Anchor:
        return Anchor(round=0, digest=SWARM, voters=self.founders)

    def voters_before(self, number: int) -> tuple[PeerId, ...]:
        """Who decided this round."""
        return self.log[number - 2].result.voters if number > 1 else self.founders

    def digest_before(self, number: int) -> bytes:
        return digest_record(self.log[number - 2].result) if number > 1 else SWARM


@st.composite
def draw_voters(draw: st.DrawFn, rule: QuorumRule) -> tuple[PeerId, ...]:
    """Some honest ones, and as many liars as the rule allows at most."""
    honest = draw(st.lists(st.sampled_from(HONEST), min_size=1, max_size=len(HONEST), unique=True))
    liars = draw(st.lists(st.sampled_from(LIARS), max_size=len(LIARS), unique=True))
    while liars and len(liars) >= blocking_size(len(honest) + len(liars), rule):
        liars.pop()
    return tuple(draw(st.permutations([one.peer for one in (*honest, *liars)])))


@st.composite
def draw_history(draw: st.DrawFn) -> History:
    rule = draw(st.sampled_from(QuorumRule))
    authority = Authority(swarm=SWARM, rule=rule, owner=OWNER.peer, parts=1, may_declare=rule is QuorumRule.MAJORITY)
    voters = founders = draw(draw_voters(rule))
    previous, log = SWARM, []
    for number in range(1, draw(st.integers(1, ROUNDS_MAX)) + 1):
        following = draw(st.one_of(st.just(voters), st.just(voters), draw_voters(rule)))
        is_reroot = draw(st.integers(0, 9)) == 0
        result = make_result(number, previous, following, {} if is_reroot else {voters[0]: 10})
        if is_reroot:
            log.append(certify(SWARM, result, [OWNER], REROOT_ATTEMPT))
        else:
            count = draw(st.integers(quorum_size(len(voters), rule), len(voters)))
            signers = draw(st.permutations(voters))[:count]
            log.append(certify(SWARM, result, [IDENTITY_OF[peer] for peer in signers]))
        previous, voters = digest_record(result), following
    return History(authority=authority, founders=founders, log=tuple(log))


@contextmanager
def open_store(history: History) -> Iterator[LedgerStore]:
    rows = [
        StoredCertificate(round=one.result.round, result_digest=digest_record(one.result), body=encode_record(one))
        for one in history.log
    ]
    with TemporaryDirectory() as folder, LedgerStore.open(Path(folder) / "ledger.sqlite") as store:
        store.fill(batches=(), certificates=rows, abandoned=(), checkpoints=(), records={})
        yield store


@given(draw_history(), st.lists(st.integers(1, ROUNDS_MAX), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_a_newcomer_gets_to_the_true_head_wherever_the_log_was_cut(history: History, cuts: list[int]) -> None:
    with open_store(history) as store:
        trail = CertificateTrail(store, history.genesis, history.authority)
        kept_from = 1
        for cut in sorted(min(cut, len(history.log)) for cut in cuts):
            trail.shorten(cut)
            kept_from = max(kept_from, cut)
            assert store.get_first_round() == kept_from, "every log leads on, so every cut is made"
        checkpoints = tuple(trail.load())
        anchor = check_trail(history.genesis, checkpoints, history.authority)
        if kept_from > 1:
            assert (anchor.round, anchor.digest) == (kept_from, digest_record(history.log[kept_from - 1].result))
            assert trail.check() == anchor
        rest = history.log[anchor.round :]
        check_stretch(anchor.digest, anchor.voters, rest, history.authority)
        reroots = {one.result.round for one in history.log[:kept_from] if one.attempt == REROOT_ATTEMPT}
        assert kept_from == 1 or reroots <= {one.certificate.result.round for one in checkpoints}


@st.composite
def draw_forgery(draw: st.DrawFn, history: History) -> tuple[Anchor, Checkpoint]:
    """Something for who believes a true round, by liars, strangers, and honest votes that no quorum joined."""
    start = draw(st.integers(0, len(history.log) - 1))
    anchor = history.genesis
    if start:
        result = history.log[start - 1].result
        anchor = Anchor(round=start, digest=digest_record(result), voters=result.voters)
    number = draw(st.integers(start + 1, len(history.log)))
    true = history.log[number - 1]
    true_voters = history.voters_before(number)
    forgers = [one for one in (*LIARS, *STRANGERS) if draw(st.booleans())]
    before = history.log[number - 2].result if number > 1 else None
    previous = history.digest_before(number)
    if before is not None and draw(st.booleans()):
        # Another round before, which names whomever the forgers like; it may be the one that the forged round names.
        before = replace(
            before, voters=tuple(dict.fromkeys((*(one.peer for one in (*forgers, *STRANGERS)), *true_voters)))
        )
        previous = draw(st.sampled_from([previous, digest_record(before)]))
    lost_votes: list[Identity] = []
    if previous == history.digest_before(number):
        # Honest voters may have voted for another result in an attempt that failed, but never enough of them.
        lying = {one.peer for one in LIARS} & set(true_voters)
        short = quorum_size(len(true_voters), history.authority.rule) - 1 - len(lying)
        honest = [IDENTITY_OF[peer] for peer in true_voters if peer not in lying]
        lost_votes = honest[: draw(st.integers(0, max(0, short)))]
    result = make_result(number, previous, [one.peer for one in STRANGERS], {STRANGERS[0].peer: 9}, nonce=77)
    attempt = draw(st.sampled_from([0, 1, REROOT_ATTEMPT]))
    if attempt == REROOT_ATTEMPT:
        result = make_result(number, previous, [one.peer for one in STRANGERS], {})
        lost_votes = []  # nobody honest signs a re-root that he has not seen the time for
    signers = list({one.peer: one for one in (*lost_votes, *forgers, *STRANGERS)}.values())
    forged = certify(SWARM, result, signers, attempt)
    if draw(st.integers(0, 4)) == 0:
        forged = replace(true, votes=true.votes[:1], result=replace(true.result, voters=(STRANGERS[0].peer,)))
    return anchor, Checkpoint(before=before, certificate=forged)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_nothing_but_the_true_rounds_is_believed(data: st.DataObject) -> None:
    history = data.draw(draw_history())
    anchor, forged = data.draw(draw_forgery(history))
    try:
        reached = check_trail(anchor, [forged], history.authority)
    except ProtocolError:
        return
    true = {digest_record(one.result) for one in history.log}
    assert reached.digest in true, "a forged round was believed"
