"""How a simulated peer that is behind gets the log: certificate by certificate, or by a snapshot when it is far behind.

As in node/catchup.py: the certificates lead from the own head to the round after the snapshot, each signed by the
voters that the one before it names, and the last one names the snapshot's root.
"""

from typing import TYPE_CHECKING

import numpy as np

from shoal.protocol.effects import Forked
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.messages import CERTIFICATES_PER_ANSWER, Certificate, Result, digest_record
from shoal.protocol.quorum import Head, check_votes
from shoal.protocol.replica import Replica
from tests.sim.disk import Snapshot
from tests.sim.training import train

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer

SNAPSHOT_EVERY = 4  # rounds
REPLAY_ROUNDS_MAX = 6  # behind by more, a snapshot is asked for first
QUESTION_BYTES = 64
ANSWER_TIMEOUT_S = 10.0
REPLAY_TIMEOUT_S = 60.0
CERTIFICATE_BYTES = 1000


def write_snapshot(peer: "SimPeer") -> None:
    """Keep the state as it is now; it is on the disk a while later."""
    replica = peer.replica
    if replica.round % SNAPSHOT_EVERY == 0:
        snapshot = Snapshot(
            round=replica.round, params=replica.params.copy(), momentum=replica.momentum.copy(), root=replica.root()
        )
        result = peer.disk.certificates[replica.round].result
        peer.later(peer.work_s(0.05, 0.2), _keep_snapshot, peer, snapshot, result)


def _keep_snapshot(peer: "SimPeer", snapshot: Snapshot, result: Result) -> None:
    own = peer.disk.certificates.get(snapshot.round)
    if own is not None and own.result == result:  # this log has not been left meanwhile
        peer.disk.keep_snapshot(snapshot)


def ask_for_log(peer: "SimPeer", donor: "SimPeer", target: int) -> None:
    """Ask for what leads to round `target`, which the donor holds."""
    head = peer.core.head.round
    peer.target, peer.target_until_s = target, peer.clock() + ANSWER_TIMEOUT_S
    if target - head > REPLAY_ROUNDS_MAX:
        peer.transmit(donor, QUESTION_BYTES, "snapshot?", tell_snapshot, donor, peer, head)
    else:
        peer.transmit(donor, QUESTION_BYTES, "behind", tell_log, donor, peer, head + 1)


def is_catching_up(peer: "SimPeer") -> bool:
    """Whether it is on its way to a round; meanwhile its log is compared with nobody's."""
    return peer.core.head.round < peer.target and peer.clock() < peer.target_until_s


def tell_log(donor: "SimPeer", asker: "SimPeer", first: int) -> None:
    """Certificates whose updates are here, or what leads over those whose updates are not."""
    certificate = donor.disk.certificates.get(first)
    if certificate is not None and any(donor.disk.read(part.digest) is None for part in certificate.result.parts):
        tell_snapshot(donor, asker, first - 1)
    else:
        tell_certificates(donor, asker, first)


def tell_certificates(donor: "SimPeer", asker: "SimPeer", first: int) -> None:
    found = []
    for number in range(first, first + CERTIFICATES_PER_ANSWER):
        certificate = donor.disk.certificates.get(number)
        if certificate is None:
            break
        found.append(certificate)
    if found:
        size, what = CERTIFICATE_BYTES * len(found), f"certificates {first}+{len(found)}"
        donor.transmit(asker, size, what, take_certificates, asker, donor, tuple(found))


def take_certificates(peer: "SimPeer", donor: "SimPeer", certificates: tuple[Certificate, ...]) -> None:
    if _meets_other_log(peer, donor, certificates):
        return
    peer.target_until_s = peer.clock() + REPLAY_TIMEOUT_S
    peer.replay = {one.result.round: one for one in certificates}
    peer.replay_next(donor.identity.peer)


def _meets_other_log(peer: "SimPeer", donor: "SimPeer", certificates: tuple[Certificate, ...]) -> bool:
    """Whether these do not follow the own head, so that the logs are to be compared."""
    first, head = certificates[0].result, peer.core.head
    if first.round != head.round + 1 or first.previous == head.digest or not peer.world.cluster.may_part:
        return False
    peer.target = 0
    peer._execute(Forked(peer=donor.identity.peer))
    return True


def tell_snapshot(donor: "SimPeer", asker: "SimPeer", after: int) -> None:
    """The newest snapshot that a certificate vouches for, with the certificates up to there."""
    certificates = donor.disk.certificates
    for number in sorted(donor.disk.snapshots, reverse=True):
        chain = tuple(certificates[one] for one in range(after + 1, number + 2) if one in certificates)
        if number > after and len(chain) == number + 1 - after:
            snapshot = donor.disk.snapshots[number]
            size = snapshot.params.nbytes * 2
            args = (asker, donor, snapshot, chain)
            donor.stream(asker, f"snapshot {number}", size, lambda: True, take_snapshot, *args)
            return
    tell_certificates(donor, asker, after + 1)


def take_snapshot(peer: "SimPeer", donor: "SimPeer", snapshot: Snapshot, chain: tuple[Certificate, ...]) -> None:
    """Begin to install it, once it is known for what was certified."""
    head = peer.core.head
    if peer.busy or chain[0].result.round != head.round + 1:
        return  # it came too late
    if _meets_other_log(peer, donor, chain):
        return
    try:
        following = _check_chain(peer, head, snapshot, chain)
    except ProtocolError as error:
        peer.world.checker.accused(peer, donor.identity.peer, snapshot, error)
        return
    peer.busy = True
    peer.disk.begin({}, *chain[:-1], snapshot)
    peer.later(peer.work_s(0.05, 0.2), _install, peer, following, snapshot)


def _check_chain(peer: "SimPeer", head: Head, snapshot: Snapshot, chain: tuple[Certificate, ...]) -> Head:
    previous, voters = head.digest, head.voters
    authority = peer.manifest.authority(peer.swarm)
    for certificate in chain[:-1]:
        if certificate.result.previous != previous:
            raise ProtocolError(Refusal.WRONG_BASE, "a certificate does not follow")
        check_votes(certificate, voters, authority)
        previous, voters = digest_record(certificate.result), certificate.result.voters
    last = chain[-1]
    check_votes(last, voters, authority)
    replica = Replica(peer.manifest, np.copy(snapshot.params), np.copy(snapshot.momentum), snapshot.round)
    if last.result.previous != previous or last.result.base_root != replica.root():
        raise ProtocolError(Refusal.WRONG_DIGEST, "a snapshot is not what was certified")
    return Head(round=snapshot.round, digest=previous, state_root=replica.root(), voters=voters)


def _install(peer: "SimPeer", head: Head, snapshot: Snapshot) -> None:
    """A snapshot is on the disk: go on from there. What was trained is dropped, its base is gone."""
    peer.disk.finish()
    peer.replica.params[:], peer.replica.momentum[:] = snapshot.params, snapshot.momentum
    peer.replica.round = snapshot.round
    peer.world.checker.installed(peer, head)
    peer.contributor.clear()
    peer.parted.clear()
    peer.world.checker.restarted_from_base(peer)
    peer.local = peer.replica.params.copy()
    peer.steps = peer.missed = 0
    peer.core.take_effects()
    peer.queue.clear()
    peer.begin_round(head)
    train(peer)
    peer._drain()
