"""What the daemon tells about itself: the Status, the metrics, and the happenings, all from the same values.

Invariant: a reason has one text everywhere: the value of its enum, in the log, in the metrics and in the status.
"""

import asyncio
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from shoal.node.answers import Answers
from shoal.node.catchup import CatchUp
from shoal.node.compute import Compute
from shoal.node.conduct import Conduct
from shoal.node.config import ON_DISK, TRAINER, NodeConfig
from shoal.node.control import ControlPlane
from shoal.node.control_setup import describe_control
from shoal.node.exchange import PartExchange
from shoal.node.gate import Gate
from shoal.node.happenings import REMEDIES, Happening, HappeningFeed, HappeningKind, Severity, describe_notes
from shoal.node.ledger_sync import LedgerSync
from shoal.node.line_use import LineUse
from shoal.node.link_port import LinkPath
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.node.membership import CLOCK_SKEW_WARN_S, Membership
from shoal.node.metrics import Direction, LedgerHeld, Metrics, PeerState, TrainerFailure, WayFailure
from shoal.node.reach_metrics import show_reachability
from shoal.node.state_vectors import measure_vectors
from shoal.node.status import (
    CatchUpStatus,
    ControlStatus,
    DiskStatus,
    FailureStatus,
    LossHistory,
    PeerStatus,
    ReasonCount,
    RoundStatus,
    Status,
    TrafficStatus,
    Wait,
    clean_text,
    describe_unused,
    keep_peers,
)
from shoal.node.surroundings import Surroundings
from shoal.node.tensor_paths import TensorPaths
from shoal.node.traffic_report import describe_traffic, show_traffic
from shoal.node.training_report import describe_measurements, describe_training, measure_tokens_per_s, show_training
from shoal.node.web import WebSources
from shoal.protocol.abstention import Abstention
from shoal.protocol.effects import (
    AttemptFailed,
    Note,
    PartReassigned,
    Phase,
    PhaseEntered,
    Planned,
    QuorumSeen,
    SenderMissing,
)
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId, format_peer_id, short_peer_id
from shoal.protocol.manifest import Manifest, SwarmUri
from shoal.protocol.messages import Presence, Result
from shoal.protocol.quorum import quorum_size
from shoal.protocol.rounds import RoundCore

LAG_PERIOD_S = 0.1
NOTES_DELAY_S = 0.2
REFUSED_SHOWN_MAX = 8
URI_BOOTSTRAPS_MAX = 4
_LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """Everything that is reported on."""

    config: NodeConfig
    me: PeerId
    swarm: bytes
    manifest: Manifest
    core: RoundCore
    state: LocalState
    exchange: PartExchange
    control: ControlPlane
    links: TensorLinks
    line: LineUse
    paths: TensorPaths
    surroundings: Surroundings
    ledger: LedgerSync
    membership: Membership
    compute: Compute
    catch_up: CatchUp
    conduct: Conduct
    gate: Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    """What went wrong last, of one kind; `at_s` is wall-clock time."""

    reason: Failure
    peer: PeerId | None
    round: int
    attempt: int
    at_s: float


def tell_abstention(abstention: Abstention) -> str:
    """Why this peer does not vote, and until when."""
    if abstention.goes_on:
        return f"{Failure.VOTES_FORGOTTEN}: the vote record was lost; no quorum is possible without it, so it goes on"
    if abstention.lasts:
        return f"{Failure.VOTES_FORGOTTEN}: abstaining, because another process signs with this peer's key"
    number = abstention.until_round()
    until = "it votes again when it has heard the other voters" if number is None else f"until about round {number}"
    return f"{Failure.VOTES_FORGOTTEN}: abstaining since the vote record was lost, {until}"


class Reporter:
    """Keeps the counts that nobody else needs. All calls on the event loop."""

    def __init__(self, metrics: Metrics, feed: HappeningFeed) -> None:
        self.metrics = metrics
        self.feed = feed
        self.subjects: Subjects
        self.started_s = time.time()
        self.joined = False
        self.leaving = False
        self.control_up = True
        self._disk: tuple[Failure, str] | None = None  # what keeps this peer from voting
        self._disk_stops = 0
        self._pair_failure: Failure | None = None  # of the last turn without a quorum
        self.control_bytes: dict[Direction, int] = dict.fromkeys(Direction, 0)
        self.losses = LossHistory()
        self.rounds_certified = 0
        self.participants: dict[int, int] = {}
        self._aborted: Counter[str] = Counter()
        self._notes: list[Note] = []
        self._clock_told = False
        self._reach_told = ""
        self._failures: dict[HappeningKind, _Failed] = {}
        self._phase: tuple[Phase, float] | None = None
        self._attempt = 0
        self._round = 0
        self._round_began_s = time.monotonic()
        self._train_ended_s = 0.0

    # -- happenings --------------------------------------------------------------------------------------------------

    def happen(self, kind: HappeningKind, text: str, severity: Severity = Severity.INFO) -> None:
        """Tell people: in the log, on the page, in the status."""
        self.feed.publish(Happening(at_s=time.time(), severity=severity, kind=kind, text=text))
        log.log(_LEVELS[severity], "%s", text)

    def note(self, note: Note) -> None:
        """Something that the round core did or found."""
        metrics = self.metrics
        match note:
            case PhaseEntered():
                self._enter_phase(note)
            case AttemptFailed():
                metrics.attempt_failures[note.reason].add()
                metrics.last_failure.set(note.reason)
                self._aborted[note.reason.value] += 1
                self._keep(HappeningKind.ATTEMPT_FAILED, note, note.peer, note.attempt)
            case PartReassigned():
                metrics.parts_reassigned[note.reason].add()
                self._keep(HappeningKind.PART_REASSIGNED, note, note.old_owner, self._attempt)
            case SenderMissing():
                metrics.senders_missing[note.reason].add()
                self._keep(HappeningKind.SENDER_MISSING, note, note.peer, self._attempt)
            case QuorumSeen():
                self._tell_quorum(note)
            case Planned():
                log.debug("planned attempt %d of round %d for %d peers", note.attempt, note.round, len(note.roster))
        if isinstance(note, AttemptFailed | PartReassigned | SenderMissing):
            # Alike notes about several parts of a round come together and become one sentence.
            if not self._notes:
                asyncio.get_running_loop().call_later(NOTES_DELAY_S, self._tell_notes)
            self._notes.append(note)

    def _tell_quorum(self, note: QuorumSeen) -> None:
        metrics = self.metrics
        metrics.last_failure.set(None if note.in_sight else Failure.NO_QUORUM)
        if not note.in_sight:
            counts = f"{note.live} of the {note.needed} voters that are needed are in sight"
            text = f"{Failure.NO_QUORUM}: {counts}; this peer trains on and waits"
            self.happen(HappeningKind.ATTEMPT_FAILED, text, Severity.WARNING)
        elif self.rounds_certified:
            self.happen(HappeningKind.NETWORK, f"a quorum is in sight: {note.live} voters, {note.needed} needed")

    def _tell_notes(self) -> None:
        notes, self._notes = self._notes, []
        for happening in describe_notes(notes, self.name_of, time.time()):
            self.feed.publish(happening)
            log.warning("%s", happening.text)

    def _keep(
        self,
        kind: HappeningKind,
        note: AttemptFailed | PartReassigned | SenderMissing,
        peer: PeerId | None,
        attempt: int,
    ) -> None:
        # Taken out first, so that the newest stands last.
        self._failures.pop(kind, None)
        self._failures[kind] = _Failed(
            reason=note.reason, peer=peer, round=note.round, attempt=attempt, at_s=time.time()
        )

    def _enter_phase(self, note: PhaseEntered) -> None:
        now = time.monotonic()
        if note.round != self._round:
            self.metrics.last_failure.set(None)
        self._round, self._attempt = note.round, note.attempt
        if self._phase is not None:
            phase, since = self._phase
            self.metrics.phase_s[phase].observe(now - since)
        if note.phase is Phase.EXCHANGE:
            self._train_ended_s = now
        self._phase = note.phase, now
        self.metrics.phase.set(note.phase)
        self.metrics.attempt.set(note.attempt)
        self.metrics.round.set(note.round)

    def committed(self, result: Result, included: bool, is_reroot: bool) -> None:
        """A round was certified and applied."""
        now = time.monotonic()
        self.rounds_certified += 1
        self.metrics.rounds_certified.add()
        self.metrics.round_s.observe(now - self._round_began_s)
        if self._train_ended_s > self._round_began_s:
            self.metrics.overhead_s.observe(now - self._train_ended_s)
        self._round_began_s = now
        self.participants[result.round] = len(result.members)
        if len(self.participants) > 4096:
            del self.participants[min(self.participants)]
        loss = self.subjects.compute.loss
        if loss is not None:
            self.losses.add(result.round, loss)
        if not result.parts:
            why = f"re-root, {len(result.voters)} vote from now on" if is_reroot else "a peer leaves"
            self.happen(HappeningKind.ROUND_CERTIFIED, f"round {result.round} changed the voters: {why}")
            return
        part, members = "" if included else ", without this peer", len(result.members)
        text = f"round {result.round} certified by {members} peer{'' if members == 1 else 's'}{part}"
        self.happen(HappeningKind.ROUND_CERTIFIED, text + (f", loss {loss:.3f}" if loss is not None else ""))

    def peer_lost(self, peer: PeerId, reason: Failure) -> None:
        self.metrics.peers_lost[reason].add()
        said = "not seen since this peer's start:" if reason is Failure.PEER_UNSEEN else "lost"
        text = f"{said} {self.name_of(peer)}: {reason}; {REMEDIES[reason]}"
        severity = Severity.INFO if reason is Failure.PEER_LEFT else Severity.WARNING
        self.happen(HappeningKind.PEER_LOST, text, severity)

    def reach_changed(self, text: str) -> None:
        """Where others can dial this peer, if anywhere; said when it is another sentence than before."""
        if text != self._reach_told:
            self._reach_told = text
            self.happen(HappeningKind.NETWORK, text)

    def way_opened(self, peer: PeerId, path: LinkPath) -> None:
        """A peer that cannot be dialled is linked all the same."""
        self.metrics.ways_opened[path].add()
        log.info("%s is linked: %s", self.name_of(peer), path)

    def way_failed(self, peer: PeerId, reason: Failure) -> None:
        """One way to a peer that cannot be dialled has led nowhere."""
        self.metrics.way_failures[WayFailure(reason)].add()
        log.info("no way to %s: %s; %s", self.name_of(peer), reason, REMEDIES[reason])

    def trainer_restarted(self, reason: Failure, detail: str) -> None:
        """The trainer has failed."""
        self.metrics.trainer_restarts[TrainerFailure(reason)].add()
        self.happen(
            HappeningKind.TRAINER, f"the trainer failed: {reason} ({detail}); {REMEDIES[reason]}", Severity.WARNING
        )

    def pair_told(self, peer: PeerId | None, failure: Failure | None) -> None:
        """While there is no quorum this peer trains on, mixed with that one or not. What is so again is told once."""
        before, self._pair_failure = self._pair_failure, failure
        if failure is None:
            assert peer is not None, "nobody mixes alone"
            text = f"{Failure.NO_QUORUM}: mixed with {self.name_of(peer)}; training goes on"
        else:
            if failure is before:
                return
            who = f" ({self.name_of(peer)})" if peer is not None else ""
            text = f"{Failure.NO_QUORUM}: mixed with nobody: {failure}{who}; {REMEDIES[failure]}"
        self.happen(HappeningKind.TRAINER, text)

    def disk_stopped(self, reason: Failure, detail: str) -> None:
        """This peer does not vote, because of its disk."""
        self._disk = reason, detail
        self._disk_stops += 1
        self.metrics.disk_errors.add()
        self.metrics.disk_stopped.set(1)
        until = "there is space" if reason is Failure.DISK_FULL else "it is started again"
        text = f"{reason}: {detail}; this peer votes and contributes no more until {until}"
        self.happen(HappeningKind.DISK, text, Severity.ERROR)

    def disk_resumed(self, detail: str) -> None:
        """It votes again."""
        reason = self._disk[0] if self._disk else Failure.DISK_FULL
        self._disk = None
        self.metrics.disk_stopped.set(0)
        self.happen(HappeningKind.DISK, f"{reason} is over: {detail}; this peer votes and contributes again")

    def name_of(self, peer: PeerId) -> str:
        """What people call a peer here."""
        if peer == self.subjects.me:
            return "this peer"
        known = self.subjects.membership.table.newest(peer)
        name = clean_text(_name_in(known)) if known else ""
        return f"{name} ({short_peer_id(peer)})" if name else short_peer_id(peer)

    async def watch_lag(self) -> None:
        """Measure how late the loop runs its timers: what all of its work waits."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self.metrics.loop_lag_s.observe(max(0.0, loop.time() - due))

    # -- the status --------------------------------------------------------------------------------------------------

    def build_status(self) -> Status:
        """Everything that a person or a program asks, as of now."""
        one = self.subjects
        live = one.membership.table.live()
        return Status(
            version=version("shoal"),
            peer=format_peer_id(one.me),
            name=one.config.node.name,
            swarm=one.swarm.hex(),
            swarm_name=one.manifest.name,
            uri=self.describe_uri(),
            role=one.config.node.role,
            at_s=time.time(),
            uptime_s=time.time() - self.started_s,
            joined=self.joined,
            leaving=self.leaving,
            control_up=self.control_up,
            round=self._round_status(live),
            training=describe_training(one.compute, self.losses, one.manifest.training.inner_steps),
            measured=describe_measurements(one.ledger.measurements(), one.compute.loss_unit, self.name_of),
            traffic=self._traffic_status(),
            line=one.line.status(),
            catch_up=CatchUpStatus(
                active=one.catch_up.active, rounds_behind=self._rounds_behind(live), detail=one.catch_up.detail
            ),
            disk=self._disk_status(),
            reach=self.subjects.paths.reach.status(),
            control=self._control_status(),
            tensor_relay=self.subjects.paths.relay.status(),
            router=self.subjects.surroundings.router_status(),
            peers=self._peer_rows(live),
            rounds_certified=self.rounds_certified,
            aborted=tuple(ReasonCount(reason=reason, count=count) for reason, count in sorted(self._aborted.items())),
            failures=self._failure_rows(),
            warnings=self._warnings(live),
            happenings=self.feed.recent,
        )

    def _failure_rows(self) -> tuple[FailureStatus, ...]:
        now = time.time()
        return tuple(
            FailureStatus(
                kind=kind,
                reason=one.reason.value,
                peer="" if one.peer is None else self.name_of(one.peer),
                round=one.round,
                attempt=one.attempt,
                age_s=max(0.0, now - one.at_s),
                remedy=REMEDIES[one.reason],
            )
            for kind, one in reversed(self._failures.items())
        )

    def _round_status(self, live: Mapping[PeerId, Presence]) -> RoundStatus:
        view = self.subjects.core.view()
        head = self.subjects.core.head
        now = self.subjects.exchange.ports.now()  # the core's clock
        progress = self.subjects.compute.progress
        planned = self.subjects.manifest.training.inner_steps
        return RoundStatus(
            round=view.round,
            attempt=view.attempt,
            phase=view.phase.value,
            phase_s=0.0 if self._phase is None else time.monotonic() - self._phase[1],
            progress=min(1.0, progress.steps / planned) if progress and view.phase is Phase.GATHER else None,
            deadline_s=None if view.deadline_s is None else max(0.0, view.deadline_s - now),
            deadline=view.deadline_name,
            waiting_for=tuple(Wait(peer=format_peer_id(peer), name=self.name_of(peer)) for peer in view.waiting_for),
            voters=len(head.voters),
            voters_live=sum(1 for voter in head.voters if voter in live or voter == self.subjects.me),
            votes_needed=quorum_size(len(head.voters), self.subjects.manifest.quorum),
            head_digest=head.digest.hex(),
            state_root=head.state_root.hex(),
        )

    def _traffic_status(self) -> TrafficStatus:
        return describe_traffic(self.control_bytes, self.subjects.links, self.subjects.exchange)

    def _disk_status(self) -> DiskStatus:
        stores = self.subjects.state.stores
        rounds = stores.snapshots.rounds()
        config = self.subjects.config
        on_disk = config.store.vectors == ON_DISK
        return DiskStatus(
            failing=self._disk is not None,
            errors=self._disk_stops,
            free_bytes=shutil.disk_usage(config.data_path).free,
            blob_bytes=stores.blobs.stored_bytes,
            ledger_entries=len(self.subjects.ledger.ledger),
            snapshot_round=rounds[-1] if rounds else 0,
            oldest_round=self.subjects.state.oldest_round,
            vector_bytes=measure_vectors(config, self.subjects.manifest.layout.elements) if on_disk else 0,
        )

    def _peer_rows(self, live: Mapping[PeerId, Presence]) -> tuple[PeerStatus, ...]:
        one = self.subjects
        view = one.core.view()
        me = one.me
        head = one.core.head
        rows = [
            PeerStatus(
                peer=format_peer_id(me),
                name=self.subjects.config.node.name,
                agent=f"shoal/{version('shoal')}",
                me=True,
                alive=True,
                ready=me in view.ready,
                participating=me in view.roster,
                voter=me in head.voters,
                owner=one.paths.reach.reached,
                tokens_per_s=measure_tokens_per_s(one.compute),
                head_round=head.round,
                address="",
                path="",
            )
        ]
        for peer, presence in live.items():
            rows.append(
                PeerStatus(
                    peer=format_peer_id(peer),
                    name=clean_text(_name_in(presence)),
                    agent=clean_text(presence.agent.partition(" ")[0]),
                    me=False,
                    alive=True,
                    ready=peer in view.ready,
                    participating=peer in view.roster,
                    voter=peer in head.voters,
                    owner=presence.ready is not None and presence.ready.ready.owns,
                    tokens_per_s=presence.tokens_per_s,
                    head_round=presence.head_round,
                    address=clean_text(presence.tensor_addresses[0]) if presence.tensor_addresses else "",
                    path=one.links.path_to(peer) or "",
                )
            )
        return keep_peers(rows)

    def _rounds_behind(self, live: Mapping[PeerId, Presence]) -> int:
        newest = max((presence.head_round for presence in live.values()), default=0)
        return max(0, newest - self.subjects.core.head.round)

    def _warnings(self, live: Mapping[PeerId, Presence]) -> tuple[str, ...]:
        found = []
        if self._disk is not None:
            reason, detail = self._disk
            found.append(f"{reason}: {detail}; {REMEDIES[reason]}")
        abstention = self.subjects.core.abstention
        if abstention is not None:
            found.append(tell_abstention(abstention))
        found += self.subjects.gate.warnings()
        skew = self.clock_skew_s()
        if skew > CLOCK_SKEW_WARN_S:
            found.append(
                f"{Failure.CLOCK_SKEW}: most peers' clocks differ by {skew:.0f} s; {REMEDIES[Failure.CLOCK_SKEW]}"
            )
        refused = self.subjects.conduct.list_refused(time.monotonic())
        for peer, (refusal, left_s) in list(refused.items())[:REFUSED_SHOWN_MAX]:
            found.append(f"{self.name_of(peer)} misbehaved ({refusal}) and is refused for {left_s:.0f} s more")
        if (next_step := self.subjects.compute.next_step) != "":
            found.append(next_step)
        if (unused := self.subjects.compute.unused) != ():
            found.append(describe_unused(unused))
        training = sum(one.trains for one in live.values()) + (self.subjects.config.node.role == TRAINER)
        needed = self.subjects.manifest.rounds.peers_min
        if training < needed:
            remedy = REMEDIES[Failure.TOO_FEW_READY]
            found.append(
                f"{Failure.TOO_FEW_READY}: {training} of the {needed} peers train that a round needs; {remedy}"
            )
        if not live:
            found.append("no other peer of the swarm is in sight")
        if (router := self.subjects.surroundings.warning()) is not None:
            found.append(router)
        held = self.subjects.ledger.held
        if held is not None and (live or held is not Failure.CHAIN_UNCONFIRMED):
            found.append(f"{held}: this peer writes nothing into the ledger; {REMEDIES[held]}")
        return tuple(found)

    def check_clock(self) -> None:
        """Say once that this machine's clock is far off."""
        skew_s = self.clock_skew_s()
        if skew_s > CLOCK_SKEW_WARN_S and not self._clock_told:
            self._clock_told = True
            text = f"{Failure.CLOCK_SKEW}: most peers' clocks differ from this one's by {skew_s:.0f} s; set the clock"
            self.happen(HappeningKind.NETWORK, text, Severity.WARNING)

    def clock_skew_s(self) -> float:
        """The median difference between live peers' clocks and this one's."""
        skews = sorted(abs(skew) for skew in self.subjects.membership.clock_skew_s.values())
        return skews[len(skews) // 2] if skews else 0.0

    # -- the metrics -------------------------------------------------------------------------------------------------

    def make_sources(self, answers: Answers) -> WebSources:
        """What the web port shows; `answers` is asked for pages of the log and the ledger."""
        return WebSources(
            status=self.build_status,
            metrics=self.render_metrics,
            feed=self.feed,
            certificates=answers.list_certificates,
            checkpoints=answers.list_checkpoints,
            ledger=answers.list_batches,
        )

    def render_metrics(self) -> bytes:
        """The text exposition, with everything that is not counted where it happens brought up to date."""
        one, metrics = self.subjects, self.metrics
        live = one.membership.table.live()
        view = one.core.view()
        metrics.peers[PeerState.LIVE].set(len(live) + 1)
        metrics.peers[PeerState.READY].set(len(view.ready))
        metrics.peers[PeerState.PARTICIPATING].set(len(view.roster) or self.participants.get(one.core.head.round, 0))
        status = self._round_status(live)
        metrics.waiting_for.set(len(status.waiting_for))
        metrics.phase_age_s.set(status.phase_s)
        for deadline, gauge in metrics.deadline_s.items():
            running = status.deadline == deadline and status.deadline_s is not None
            gauge.set(status.deadline_s if running and status.deadline_s is not None else math.nan)
        metrics.voters.set(status.voters)
        metrics.voters_live.set(status.voters_live)
        metrics.clock_skew_s.set(self.clock_skew_s())
        metrics.peers_refused.set(len(one.conduct.list_refused(time.monotonic())))
        show_training(metrics, one.compute, one.ledger.measurements())
        show_traffic(metrics, self._traffic_status(), one.links, one.line.status())
        show_reachability(metrics, one.paths, one.links, self._control_status(), one.surroundings)
        metrics.rounds_behind.set(self._rounds_behind(live))
        metrics.catching_up.set(one.catch_up.active)
        metrics.fetched_bytes.count_to(one.catch_up.fetched_bytes)
        disk = self._disk_status()
        metrics.snapshot_round.set(disk.snapshot_round)
        metrics.oldest_round.set(disk.oldest_round)
        metrics.abstaining.set(one.core.abstention is not None)
        metrics.ledger_entries.set(disk.ledger_entries)
        metrics.ledger_era.set(one.ledger.ledger.era)
        metrics.ledger_held.set(None if one.ledger.held is None else LedgerHeld(one.ledger.held))
        metrics.blob_bytes.set(disk.blob_bytes)
        return metrics.render()

    def describe_uri(self) -> str:
        """By what another machine joins now: the addresses at which others have reached this peer come and go."""
        bootstraps = self.subjects.control.addresses()[:URI_BOOTSTRAPS_MAX] if self.control_up else ()
        return str(SwarmUri(swarm=self.subjects.swarm, bootstraps=bootstraps))

    def _control_status(self) -> ControlStatus:
        if not self.control_up:
            return ControlStatus()
        control = self.subjects.control
        return describe_control(control.reach(), control.addresses())


def _name_in(presence: Presence) -> str:
    """Peers put their names behind their agent: "shoal/0.1.0 name"."""
    return presence.agent.partition(" ")[2]
