"""What a simulated peer's disk leads to, and how the peer goes over to another log when two of them meet.

As in node/parting.py and node/local_state.py: the other log is checked certificate by certificate from where the two
part, what is given up is put aside before the state goes back, and the residual and the local parameters stay.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from shoal.protocol.effects import Pledge
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.lineage import check_stretch, find_parting, is_lawful, weigh
from shoal.protocol.manifest import genesis_head
from shoal.protocol.messages import Certificate, Result, Vote, digest_record, sign_message
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head
from tests.sim.catchup import CERTIFICATE_BYTES, QUESTION_BYTES, ask_for_log
from tests.sim.training import train

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer

RETRY_S = 0.02


def restore(peer: "SimPeer") -> list[Head]:
    """The heads that the disk leads to, one after the other; the replica is at the last one."""
    certificates = peer.disk.certificates
    head = _restore_snapshot(peer) or genesis_head(peer.manifest, peer.swarm, peer.replica.reset())
    found = [head]
    while (certificate := certificates.get(head.round + 1)) is not None:
        result = certificate.result
        encoded = {part.digest: peer.disk.read(part.digest) for part in result.parts}
        if None in encoded.values() or result.previous != head.digest or result.base_root != head.state_root:
            break  # the rest comes from peers
        head = peer._apply(certificate)
        found.append(head)
    return found


def _restore_snapshot(peer: "SimPeer") -> Head | None:
    certificates, replica = peer.disk.certificates, peer.replica
    for number in sorted(peer.disk.snapshots, reverse=True):
        snapshot, own, following = peer.disk.snapshots[number], certificates.get(number), certificates.get(number + 1)
        if own is None or (following is not None and following.result.base_root != snapshot.root):
            continue
        replica.params[:], replica.momentum[:] = snapshot.params, snapshot.momentum
        replica.round = number
        result = own.result
        return Head(round=number, digest=digest_record(result), state_root=replica.root(), voters=result.voters)
    return None


def sign_reroot(peer: "SimPeer", owner: Identity, voters: tuple[PeerId, ...]) -> None:
    """Write the owner's word into the folder of a peer that is down, unless what it must follow is not all there."""
    head = restore(peer)[-1]
    if head.round + 1 in peer.disk.certificates:
        return
    result = make_voters_result(head, peer.manifest.rounds.codec_out, voters)
    vote = Vote(voter=owner.peer, round=result.round, attempt=REROOT_ATTEMPT, result_digest=digest_record(result))
    signed = sign_message(owner, peer.swarm, vote)
    peer.disk.certificates[result.round] = Certificate(result=result, attempt=REROOT_ATTEMPT, votes=(signed,))


def ask_where_parted(peer: "SimPeer", donor: "SimPeer") -> None:
    """The donor follows another log: ask for the whole of it."""
    peer.transmit(donor, QUESTION_BYTES, "parted?", _tell_log, donor, peer)


def _tell_log(donor: "SimPeer", asker: "SimPeer") -> None:
    log: list[Certificate] = []
    while (certificate := donor.disk.certificates.get(len(log) + 1)) is not None:
        log.append(certificate)
    size = CERTIFICATE_BYTES * max(1, len(log))
    donor.transmit(asker, size, f"log of {len(log)}", _compare, asker, donor, tuple(log))


def _compare(peer: "SimPeer", donor: "SimPeer", theirs: tuple[Certificate, ...]) -> None:
    if peer.busy:  # something is being written
        peer.later(RETRY_S, _compare, peer, donor, theirs)
        return
    mine = [peer.disk.certificates[number] for number in range(1, peer.core.head.round + 1)]
    first = find_parting(mine, theirs)
    if first is None:
        return
    own, other = mine[first - 1 :], theirs[first - 1 :]
    try:
        _check_log(peer, own[0], other, mine[first - 2] if first > 1 else None)
    except ProtocolError as error:
        peer.world.checker.accused(peer, donor.identity.peer, other[0], error)
        return
    pledge, weight = peer.core.pledge(), weigh(own)
    if pledge is not None and weight.tokens < pledge.tokens:
        # Half of a log that is being replayed weighs as much as all of it.
        weight = replace(weight, tokens=pledge.tokens)
    if weight < weigh(other):
        _go_over(peer, donor, first, theirs)


def _check_log(peer: "SimPeer", own: Certificate, other: tuple[Certificate, ...], before: Certificate | None) -> None:
    if not is_lawful(own, other[0]):
        raise ProtocolError(Refusal.EQUIVOCATION, f"round {own.result.round} has two results and no re-root")
    genesis = genesis_head(peer.manifest, peer.swarm, b"")
    previous = digest_record(before.result) if before else genesis.digest
    voters = before.result.voters if before else genesis.voters
    check_stretch(previous, voters, other, peer.manifest.authority(peer.swarm))


def _go_over(peer: "SimPeer", donor: "SimPeer", first: int, theirs: tuple[Certificate, ...]) -> None:
    """First it is durable where the peer goes; then what was certified since is put aside, and the state goes back."""
    last = theirs[-1].result
    peer.world.happen(f"goes over {peer.number}, to the log of {donor.number} from round {first} to {last.round}")
    peer.busy = True
    chosen = digest_record(theirs[first - 1].result)
    tokens = weigh(theirs[first - 1 :]).tokens
    peer.disk.vote = peer.core.leave_log(Pledge(first=first, digest=chosen, end=last.round, tokens=tokens))
    peer.later(peer.work_s(0.002, 0.02), _rewind, peer, donor, first, last)


def _rewind(peer: "SimPeer", donor: "SimPeer", first: int, last: Result) -> None:
    peer.disk.abandon(first)
    found = restore(peer)
    peer.world.checker.rewound(peer, first, digest_record(last), found)
    peer.later(peer.work_s(0.02, 0.2), _switch, peer, donor, found[-1], last.round)


def _switch(peer: "SimPeer", donor: "SimPeer", head: Head, last: int) -> None:
    # Logs that parted may lead to the same state, and what was offered on one be counted on the other.
    offered = (peer.frozen, *peer.taken_back, *peer.parted)
    peer.parted = [one for one in offered if one is not None and one.round > head.round]
    peer.finish_round()
    peer.replay.clear()
    peer.core.take_effects()
    peer.queue.clear()
    peer.core.switch(head, peer.clock())
    peer.busy = False
    peer.world.checker.sees(peer)
    if peer.waiting:
        train(peer)  # what was handed over is offered after more work, anchored at the base that stayed
    peer._drain()
    ask_for_log(peer, donor, last)
