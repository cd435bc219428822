"""A stage for scenarios: a world without chance, a script in place of drawn faults, and a transcript that people read.

Peers have names in the order in which they would lead the attempts of round 1: ann leads attempt 0. Every invariant of
the simulator is checked here, too.
"""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from shoal.protocol.attendance import WORK
from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    Effect,
    EndTraining,
    FetchBlob,
    PartReassigned,
    Persist,
    Phase,
    PhaseEntered,
    Planned,
    QuorumSeen,
    Reduce,
    Send,
    SenderMissing,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Contribution,
    Nack,
    PartDone,
    Plan,
    Prepare,
    Promise,
    Proposal,
    Ready,
    Result,
    Vote,
    digest_record,
)
from shoal.protocol.quorum import Head, QuorumRule, list_members, proposer_order, quorum_size
from tests.sim.clusters import RULES, Cluster
from tests.sim.faults import DiskFate
from tests.sim.peer import SimPeer
from tests.sim.world import World

NAMES = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
SEED = 1839  # of a cast in which every scenario can be played
DELAY_S = 0.02
NOTICED_S = 0.05  # a connection that is reset is noticed so soon
TRAINING_S = 2.0
LIMIT_S = 120.0
TOGETHER_S = 0.5  # what several do within this time is told once
T = TypeVar("T")


class Even(random.Random):
    """Nothing is a little more or less than usual."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


@dataclass(frozen=True, slots=True)
class Deed:
    """A peer did this."""

    at_s: float
    peer: SimPeer
    effect: Effect


@dataclass(slots=True)
class Entry:
    """A line of the transcript; nobody's is a stage direction."""

    at_s: float
    names: list[str]
    text: str


Trigger = Callable[[SimPeer, Effect], bool]


def is_vote(record: VoteRecord) -> bool:
    """Whether this is written for a vote, not for a promise or for leading."""
    return record.accepted is not None and record.accepted_attempt == record.promised >= record.led - 1


class Stage(World):
    """`peers` found the swarm and are there from the start; `newcomers` may join."""

    def __init__(
        self,
        peers: int,
        newcomers: int = 0,
        parts: int = 4,
        grace_s: float = RULES["grace_s"],
        weights: str = WORK,
    ) -> None:
        elements = parts * int(RULES["part_elements"]) - 100
        everybody = peers + newcomers
        cluster = Cluster(
            founders=peers, first=peers, everybody=everybody, elements=elements, grace_s=grace_s, weights=weights
        )
        super().__init__(SEED, faults=(), cluster=cluster)
        self.network._delay_s = lambda rng, now: DELAY_S  # type: ignore[method-assign]
        self.deeds: list[Deed] = []
        self._entries: list[Entry] = []
        self._scripts: list[tuple[Trigger, Callable[[SimPeer], object], bool]] = []
        self._open: tuple[float, int] | None = None
        self._labels: dict[tuple[int, bytes], str] = {}
        self._cast()
        committed, announced = self.checker.committed, self.checker.announced

        def see_commit(peer: SimPeer, certificate: Certificate, head: Head) -> None:
            committed(peer, certificate, head)
            self._tell_commit(peer, certificate)

        def see_ready(peer: PeerId, ready: Ready) -> None:
            announced(peer, ready)
            self.tell(self.by_id[peer], f"is ready for round {ready.round}")

        self.checker.committed = see_commit  # type: ignore[method-assign]
        self.checker.announced = see_ready  # type: ignore[method-assign]

    def _cast(self) -> None:
        head = self.checker.newest_head()
        order = [self.by_id[peer] for peer in proposer_order(head.digest, head.voters)]
        order += [peer for peer in self.everybody if peer not in order]
        self._names = {peer.number: NAMES[at] for at, peer in enumerate(order)}
        self._by_name = {NAMES[at]: peer for at, peer in enumerate(order)}
        for at, peer in enumerate(order):
            peer.rng = Even(at)
            peer.training_s = TRAINING_S + 0.2 * at
            peer._execute = partial(self._execute, peer, peer._execute)  # type: ignore[method-assign]
        for at, peer in enumerate(one for one in order if one in self.peers):
            self.schedule(0.1 * at, self._boot, peer)

    # -- who is who --------------------------------------------------------------------------------------------------

    def peer(self, name: str) -> SimPeer:
        return self._by_name[name]

    def name(self, peer: PeerId | SimPeer) -> str:
        one = peer if isinstance(peer, SimPeer) else self.by_id[peer]
        return self._names[one.number]

    def list_names(self, peers: Iterable[PeerId | SimPeer]) -> str:
        return " ".join(sorted(self.name(peer) for peer in peers))

    def up(self) -> list[SimPeer]:
        return [peer for peer in self.peers if peer.up]

    def did(self, kind: type[T], *names: str) -> list[T]:
        """The effects of this kind, in order, of these peers or of all."""
        return [
            deed.effect
            for deed in self.deeds
            if isinstance(deed.effect, kind) and (not names or self.name(deed.peer) in names)
        ]

    def said(self, kind: type[T], *names: str) -> list[T]:
        """The messages of this kind, in order; what goes to several peers counts several times."""
        return [send.message for send in self.did(Send, *names) if isinstance(send.message, kind)]

    def plan(self) -> Plan:
        """The newest plan."""
        return self.said(Plan)[-1]

    def owner_of(self, part: int, plan: Plan | None = None) -> str:
        plan = plan or self.plan()
        return self.name(plan.roster[plan.owners[part]].signed.peer)

    def result(self, number: int) -> Result:
        """The certified result of a round, as everybody who is up has it."""
        results = {digest_record(peer.disk.certificates[number].result) for peer in self.up()}
        assert len(results) == 1
        return self.certificate(number).result

    def certificate(self, number: int) -> Certificate:
        return next(peer.disk.certificates[number] for peer in self.up() if number in peer.disk.certificates)

    def first_plans(self) -> list[Plan]:
        """The plan with which each attempt began."""
        return [plan for plan in dict.fromkeys(self.said(Plan)) if not plan.revision]

    def result_of(self, name: str, number: int) -> Result:
        """The result of a round as one peer has it."""
        return self.peer(name).disk.certificates[number].result

    def newest_result(self) -> Result:
        certificates = self.peer("ann").disk.certificates
        return certificates[max(certificates)].result

    def has_contributed(self, name: str, number: int) -> bool:
        """Whether a round from this one on has the peer's work in it."""
        certificates = self.peer("ann").disk.certificates
        rounds = [one for one in certificates if one >= number]
        return any(
            self.peer(name).identity.peer in {m.peer for m in certificates[one].result.members} for one in rounds
        )

    def contributors(self, number: int, part: int) -> str:
        """Whose work is in a part of a certified round."""
        result = self.result(number)
        indices = list_members(result.parts[part].contributors, len(result.members))
        return self.list_names(result.members[index].peer for index in indices)

    # -- what the script does ------------------------------------------------------------------------------------------

    def before(self, trigger: Trigger, action: Callable[[SimPeer], object]) -> None:
        """Once, in place of the first effect for which `trigger` holds."""
        self._scripts.append((trigger, action, True))

    def after(self, trigger: Trigger, action: Callable[[SimPeer], object]) -> None:
        """Once, right after the first effect for which `trigger` holds."""
        self._scripts.append((trigger, action, False))

    def does(self, name: str, kind: type, count: int = 1) -> Trigger:
        """The `count`-th time that this peer does this, or says this to somebody."""
        seen = 0

        def triggers(peer: SimPeer, effect: Effect) -> bool:
            nonlocal seen
            message = effect.message if isinstance(effect, Send) else None
            if self.name(peer) == name and (isinstance(effect, kind) or isinstance(message, kind)):
                seen += 1
                return seen == count
            return False

        return triggers

    def writes_vote(self, name: str) -> Trigger:
        """The peer begins to make its vote durable."""
        return lambda peer, effect: isinstance(effect, Persist) and is_vote(effect.vote) and self.name(peer) == name

    def kill(self, peer: SimPeer, noticed: bool = True) -> None:
        """The peer ends without a word; `noticed`: its connections are reset, so that the others know at once."""
        self.stage_direction(f"{self.name(peer)} dies" + ("" if noticed else ", and nobody notices"))
        peer.crash(DiskFate.KEPT)
        for other in self.up():
            if noticed and self.network.connected(peer.number, other.number):
                other.later(NOTICED_S, other.connection_reset, peer.identity.peer)

    def kill_silently(self, peer: SimPeer) -> None:
        self.kill(peer, noticed=False)

    def kill_everybody(self) -> None:
        """Nobody is left to notice."""
        for peer in self.up():
            self.kill(peer, noticed=False)

    def _boot(self, peer: SimPeer) -> None:
        peer.boot()
        if peer.core.head.round:
            self.tell(peer, f"starts from its disk after round {peer.core.head.round}")

    def restart(self, *names: str) -> None:
        for name in names:
            self.stage_direction(f"{name} restarts")
            self._boot(self.peer(name))

    def join(self, *names: str) -> None:
        self.stage_direction(f"{' '.join(names)} join" + ("s" if len(names) == 1 else ""))
        for name in names:
            self._join(self.peer(name))

    def leave(self, name: str) -> None:
        self.stage_direction(f"{name} is asked to leave")
        self.peer(name).leave()

    def split(self, *groups: str) -> None:
        """Nothing passes between these groups of names."""
        sides = {name: side for side, group in enumerate(groups) for name in group.split()}
        self.network.sides = tuple(sides[self._names[peer.number]] for peer in self.everybody)
        self.stage_direction("the network splits: " + " | ".join(groups))

    def cut(self, source: str, target: str) -> None:
        """What source sends to target is lost; gossip finds another way."""
        self.network.cut.add((self.peer(source).number, self.peer(target).number))
        self.stage_direction(f"nothing gets from {source} to {target} any more")

    def heal(self) -> None:
        self.network.sides = ()
        self.network.cut.clear()
        self.stage_direction("the network heals")

    def narrow(self, name: str, bytes_per_s: float) -> None:
        self.network.uplinks[self.peer(name).number] = bytes_per_s
        self.stage_direction(f"{name} can send no more than {bytes_per_s / 1e3:.0f} kB/s")

    def run_until(self, done: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Let time pass; fails when `done` does not come true."""
        end = self.now + limit_s
        while not done():
            assert self._heap and self._heap[0][0] <= end, "\n".join(self.lines[-30:])
            self.now, _, action, args = heapq.heappop(self._heap)
            action(*args)

    def run_to_round(self, number: int, *names: str) -> None:
        """Until these peers, or all that are up, have applied this round."""

        def everybody_has() -> bool:
            peers = [self.peer(name) for name in names] or self.up()
            return bool(peers) and all(peer.up and peer.core.head.round >= number for peer in peers)

        self.run_until(everybody_has)

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        self.run_until(lambda: not self._heap or self._heap[0][0] > end, max(LIMIT_S, 2 * seconds))
        self.now = end

    def describe_cast(self) -> str:
        """Who is there."""
        names = [self._names[peer.number] for peer in self.peers]
        quorum = quorum_size(self.cluster.founders, QuorumRule(self.cluster.quorum))
        dialled = [self._names[peer.number] for peer in self.peers if peer.number % 4 == 3]
        text = f"{' '.join(sorted(names))}. {self.cluster.founders} vote in round 1, {quorum} certify."
        return text + (f" Who cannot be dialled, and so owns nothing: {' '.join(sorted(dialled))}." if dialled else "")

    # -- the transcript ------------------------------------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        self._close()
        return [f"{entry.at_s:7.2f}  {' '.join(entry.names) or '---'}  {entry.text}" for entry in self._entries]

    def stage_direction(self, text: str) -> None:
        self._close()
        self._entries.append(Entry(at_s=self.now, names=[], text=text))

    def tell(self, peer: SimPeer, text: str) -> None:
        """What one peer does at one time stands in one line, and what several do one after the other as well."""
        if self._open == (self.now, peer.number):
            self._entries[-1].text += f"; {text}"
        else:
            self._close()
            self._entries.append(Entry(at_s=self.now, names=[self.name(peer)], text=text))
            self._open = (self.now, peer.number)

    def _close(self) -> None:
        self._open = None
        if len(self._entries) > 1:
            before, last = self._entries[-2:]
            if last.names and before.text == last.text and last.at_s < before.at_s + TOGETHER_S:
                before.names += last.names
                del self._entries[-1]

    def label(self, number: int, digest: bytes) -> str:
        """The results of a round are A, B, … in the order in which they are seen."""
        seen = len([one for one in self._labels if one[0] == number])
        return self._labels.setdefault((number, digest), f"{number}{chr(ord('A') + seen)}")

    def _tell_commit(self, peer: SimPeer, certificate: Certificate) -> None:
        result = certificate.result
        label = self.label(result.round, digest_record(result))
        voters = self.list_names(vote.voter for vote in certificate.votes)
        self.tell(peer, f"applies {label}, certified in attempt {certificate.attempt} by {voters}")

    def _execute(self, peer: SimPeer, execute: Callable[[Effect], None], effect: Effect) -> None:
        for script in self._scripts:
            trigger, action, instead = script
            if trigger(peer, effect):
                self._scripts.remove(script)
                if not instead:
                    self._do(peer, execute, effect)
                action(peer)
                return
        self._do(peer, execute, effect)

    def _do(self, peer: SimPeer, execute: Callable[[Effect], None], effect: Effect) -> None:
        self.deeds.append(Deed(self.now, peer, effect))
        text = self._describe(peer, effect)
        if text:
            self._tell_grouped(peer, *text)
        execute(effect)

    def _tell_grouped(self, peer: SimPeer, text: str, target: str) -> None:
        """The same words to several peers are told once, with all targets behind them."""
        if not target:
            self.tell(peer, text)
        elif self._open == (self.now, peer.number) and text in self._entries[-1].text:
            self._entries[-1].text += f" {target}"
        else:
            self.tell(peer, f"{text} {target}")

    def _describe(self, peer: SimPeer, effect: Effect) -> tuple[str, str] | None:
        """What is done, and to whom."""
        match effect:
            case Send():
                return self._describe_message(effect.message, self.name(effect.peer))
            case SendPart():
                return "sends its parts", f"{effect.part}>{self.name(effect.peer)}"
            case SendResult():
                return f"sends the result of part {effect.part} to", self.name(effect.peer)
            case Reduce():
                return f"adds up part {effect.part} of", self.list_names(one.signed.peer for one in effect.members)
            case Persist(vote=vote) if vote.accepted is not None and is_vote(vote):
                return f"writes down its vote for {self.label(vote.round, digest_record(vote.accepted))}", ""
            case FetchBlob():
                return "looks for the missing parts", f"{effect.part}"
            case Behind():
                return f"is behind and asks for certificates from round {peer.core.round} on", self.name(effect.peer)
            case AttemptFailed():
                return f"gives up attempt {effect.attempt}: {effect.reason.value}", ""
            case PartReassigned():
                old, new = self.name(effect.old_owner), self.name(effect.new_owner)
                return f"gives part {effect.part} of {old} to {new}: {effect.reason.value}", ""
            case SenderMissing():
                return f"goes on without part {effect.part} of {self.name(effect.peer)}: {effect.reason.value}", ""
            case QuorumSeen(in_sight=True):
                return "sees a quorum", ""
            case QuorumSeen():
                return f"sees no quorum, {effect.live} of {effect.needed}", ""
            case PhaseEntered(phase=Phase.FETCH):
                return f"has the certificate of round {effect.round}, not all of its bytes", ""
            case Planned() | PhaseEntered() | Persist() | Commit() | EndTraining():
                return None
        return f"{type(effect).__name__}", ""

    def _describe_message(self, message: ROUND_MESSAGES, target: str) -> tuple[str, str] | None:
        match message:
            case Plan():
                roster = self.list_names(entry.signed.peer for entry in message.roster)
                owners = " ".join(f"{part}>{self.owner_of(part, message)}" for part in range(len(message.owners)))
                again = f", revision {message.revision}" if message.revision else f" with {roster}"
                return f"plans attempt {message.attempt} of round {message.round}{again}: parts {owners}; tells", target
            case Prepare():
                return f"asks for promises of attempt {message.attempt}:", target
            case Promise():
                accepted = message.accepted
                tail = ""
                if accepted is not None:
                    label = self.label(message.round, digest_record(accepted))
                    tail = f", having voted for {label} in attempt {message.accepted_attempt}"
                return f"promises attempt {message.attempt} to {target}{tail}", ""
            case Nack():
                return f"refuses attempt {message.attempt} of {target}, having promised {message.promised}", ""
            case PartDone():
                return f"has part {message.part} done", ""
            case Proposal():
                label = self.label(message.result.round, digest_record(message.result))
                return f"proposes {label} in attempt {message.attempt} to", target
            case Vote():
                return f"votes for {self.label(message.round, message.result_digest)}, attempt {message.attempt}", ""
            case Certified():
                label = self.label(message.certificate.result.round, digest_record(message.certificate.result))
                return f"sends the certificate of {label} to", target
            case Contribution():
                return None
        return f"{type(message).__name__} to", target
