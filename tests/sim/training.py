"""A simulated peer's trainer, and what the daemon does with it (node/compute.py): when it begins, when it is ready, and
what becomes of its work when a round is certified.

Time stands for steps: whoever ends its training early has done less. How many steps a whole training is may differ from
peer to peer (`SimPeer.training_steps`), as where rounds end by time.
"""

from typing import TYPE_CHECKING

import numpy as np

from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, Attendance, expect_attendance
from shoal.protocol.messages import Certificate
from shoal.protocol.quorum import list_counted

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer

MISSED_ROUNDS_MAX = 8
STEPS = 40  # of a training that is not cut short, unless said otherwise


def find_attendance(peer: "SimPeer", number: int) -> Attendance:
    """What the peer declares in this round besides its work, by its own log (node/own_rounds.py)."""
    rule, last = peer.manifest.rounds.weights, None
    if rule == FRESHNESS:
        return Attendance(base_age=min(peer.missed, number - 1))
    for before in range(number - 1, 0, -1) if rule == PARTICIPATION else ():
        if before not in peer.disk.certificates:
            break
        last = list_counted(peer.disk.certificates[before].result).get(peer.identity.peer)
        if last is not None:
            break
    return expect_attendance(last, number)


def train(peer: "SimPeer", *, in_step: bool = False) -> None:
    """Begin to train for the open round; an earlier training ends here. `in_step`: with the round."""
    peer.training += 1
    peer.waiting = False
    peer.in_step = in_step
    duration_s = peer.training_s * peer.work_s(0.8, 1.4)
    peer.trains_s = peer.clock(), duration_s
    peer.later(duration_s, _become_ready, peer, peer.training)
    _end_training(peer)


def end_training(peer: "SimPeer", number: int) -> None:
    """The others have ended their training for this round."""
    peer.ended_round = number
    _end_training(peer)


def _end_training(peer: "SimPeer") -> None:
    """After the step that is under way."""
    if peer.ended_round == peer.replica.round + 1 and not peer.in_step and not peer.waiting:
        peer.later(peer.trains_s[1] / peer.training_steps, _become_ready, peer, peer.training)


def _become_ready(peer: "SimPeer", training: int) -> None:
    """The trainer hands over its local parameters."""
    if training != peer.training or peer.leaving or peer.waiting:
        return
    began_s, duration_s = peer.trains_s
    noise = np.random.default_rng(peer.rng.getrandbits(63)).standard_normal(peer.local.size, dtype=np.float32)
    peer.local = peer.local - noise * np.float32(0.01)
    whole = peer.training_steps
    peer.steps += max(1, min(whole, round(whole * (peer.clock() - began_s) / duration_s)))
    peer.waiting = True
    peer.offer()


def train_alone(peer: "SimPeer") -> None:
    """What the daemon does without a quorum (node/pair_mixing.py) where it finds nobody: a pair would move the local
    parameters, which are noise here."""
    core, now = peer.core, peer.clock()
    if core.sees_quorum:
        peer.alone_since_s = None
        return
    # With every beat: where a READY is said and taken back there may be no tick for long, and the bounds stand still.
    peer.world.checker.check_bounds(peer)
    since_s = peer.alone_since_s = now if peer.alone_since_s is None else peer.alone_since_s
    frozen = peer.frozen
    is_due = now >= since_s + peer.world.cluster.gossip_after_s
    if not is_due or frozen is None or not peer.waiting or peer.leaving or not core.may_withdraw:
        return
    was_planned = core.withdraw(now)
    if was_planned:
        peer.taken_back.append(frozen)
    else:
        peer.world.checker.released(peer, frozen)
    peer.frozen = peer.ready = None
    train(peer)


def merge(peer: "SimPeer", certificate: Certificate) -> bool:
    """What the daemon and its trainer do with a certificate: settle the residual, merge the new base. True when what
    was handed over waits for the next round."""
    result = certificate.result
    members = [member.peer for member in result.members]
    included: tuple[int, ...] = ()
    held = (peer.frozen, *peer.taken_back, *peer.parted)
    offered = [one for one in held if one is not None and one.round == result.round]
    frozen = offered[0] if offered else None
    if frozen is not None and peer.identity.peer in members:
        index = members.index(peer.identity.peer)
        root = result.members[index].contribution_root
        frozen = next((one for one in offered if one.root == root), frozen)
        included = peer.contributor.settle(frozen, result, index)
        peer.world.checker.settled(peer, result, index, included)
    if not result.parts:
        return peer.waiting  # nothing moved
    peer.missed = 0 if included else peer.missed + 1
    restart = peer.missed > MISSED_ROUNDS_MAX
    if included and frozen in peer.taken_back and not restart:
        # The parameters have gone on since, and stand where they stand.
        if peer.waiting:
            train(peer)
        return False
    parts = peer.manifest.list_parts(result.round)
    for part in range(peer.manifest.parts) if restart else [parts[place] for place in included]:
        first, end = peer.manifest.part_range(part)
        peer.local[first:end] = peer.replica.params[first:end]
    if restart:
        peer.contributor.clear()
        peer.world.checker.restarted_from_base(peer)
    if restart or included:
        peer.steps, peer.missed = 0, 0
    if restart or included or peer.waiting:
        train(peer, in_step=restart or bool(included))
    peer.in_step = restart or bool(included)
    return False
