"""The composition root: builds every piece by hand, wires them, starts and stops them in order.

Start: control plane (so that a manifest can be fetched), disk, state, round core, tensor links, web, trainer.
Stop: trainer, leave notice, last snapshot, web, links, control plane, disk; every step is bounded.

Invariant: nobody else can make the start fail: with every bootstrap peer dead the daemon runs, says so, and joins when
a path appears. After `run` returns no task, thread or process of it is left.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from functools import partial

from shoal.crdt.measurements import HeldOutLoss
from shoal.node.answers import Answers
from shoal.node.attach_socket import TRAINER_FOLDER
from shoal.node.attached_trainer import choose_trainer
from shoal.node.ban_watch import BannedTries
from shoal.node.compute import Compute, ComputePorts
from shoal.node.conduct import Conduct
from shoal.node.config import TRAINER, NodeConfig
from shoal.node.control import BootstrapFailed, ControlHandlers
from shoal.node.control_setup import make_control_config
from shoal.node.disk_check import DiskCheck
from shoal.node.disk_watch import DiskPorts, DiskWatch
from shoal.node.exchange import ExchangePorts, PartExchange
from shoal.node.gate import Gate
from shoal.node.happenings import HappeningFeed, HappeningKind, Severity
from shoal.node.head_watch import HeadWatch
from shoal.node.intake import Intake, IntakePorts
from shoal.node.invitations import load_proof
from shoal.node.ledger_sync import LedgerSync
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.line_use import LineUse
from shoal.node.link_port import Address, LinkConfig
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState, open_stores
from shoal.node.log_repair import LogRepair
from shoal.node.manifest_source import SwarmChoice, choose_swarm, fetch_manifest, store_manifest
from shoal.node.membership import Membership, MembershipPorts
from shoal.node.metered_control import MeteredControl
from shoal.node.metrics import Metrics
from shoal.node.own_presence import OwnPresence
from shoal.node.pair_mixing import PairMixing
from shoal.node.peer_book_file import PEER_BOOK_FILE, load_peer_book, save_peer_book
from shoal.node.providers import Providers
from shoal.node.ready_offer import ReadyOffer
from shoal.node.rejoin import Rejoin, RejoinPorts
from shoal.node.repair import abstains, open_ledger
from shoal.node.reporting import Reporter, Subjects
from shoal.node.round_driver import DriverPorts, RoundDriver
from shoal.node.running import forget_running, note_running
from shoal.node.state_vectors import allocate_vectors
from shoal.node.surroundings import Surroundings
from shoal.node.task_set import TaskSet
from shoal.node.tensor_paths import TensorPaths, make_ports
from shoal.node.trainer import MakeTrainer
from shoal.node.training.messages import Evaluated
from shoal.node.web import WebServer
from shoal.protocol.codecs import Float32s
from shoal.protocol.effects import Phase, Pledge
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId, short_peer_id
from shoal.protocol.manifest import read_manifest_untrusted
from shoal.protocol.messages import Certificate, Presence
from shoal.protocol.outer_step import rounds_as_specified
from shoal.protocol.presence import PeerLost, PresenceTable
from shoal.protocol.quorum import Head, is_reroot
from shoal.protocol.round_state import Setting
from shoal.protocol.rounds import RoundCore

LEAVE_TIMEOUT_S = 10.0

log = logging.getLogger("shoal")


class Daemon:
    """One peer. `run` it once; `stop` from a signal handler or a test."""

    def __init__(
        self, config: NodeConfig, identity: Identity, incarnation: int, make_trainer: MakeTrainer | None = None
    ) -> None:
        self.config = config
        self._make_trainer = make_trainer
        self.identity = identity
        self.me = identity.peer
        self._incarnation = incarnation
        self._book_lock = asyncio.Lock()
        self._stop = asyncio.Event()
        self._tasks = TaskSet(self.stop)
        self._spawn = self._tasks.spawn
        self.reporter = Reporter(Metrics(), HappeningFeed())
        self.conduct = Conduct(self.me)
        disk_ports = DiskPorts(
            halt=lambda: self.driver.halt(),
            resume=lambda: self.driver.resume(),
            stopped=self.reporter.disk_stopped,
            resumed=self.reporter.disk_resumed,
        )
        self.disk_watch = DiskWatch(config.data_path, config.store.free_gib_min, disk_ports)
        self.web_port = 0

    def stop(self) -> None:
        """Leave gracefully; `run` returns when that is done."""
        self._stop.set()

    async def run(self, on_ready: Callable[["Daemon"], None]) -> None:
        """Start, serve until `stop`, leave. Raises ConfigError for what a person must mend, and DaemonFailed."""
        if not await asyncio.to_thread(rounds_as_specified):
            fix = "find the library that was built with -ffast-math and remove it"
            raise ConfigError("this machine", "float32 arithmetic is not IEEE 754 (subnormals are flushed)", fix)
        choice = choose_swarm(self.config)
        try:
            await self._start_control(choice)
            signed = choice.signed or await self._until_stopped(self._fetch_manifest(choice))
            if signed is None:
                self._tasks.check()
                return
            store_manifest(self.config, signed)
            self._signed_manifest = signed
            await self._assemble(signed, choice)
            await self._serve()
            note_running(self.config.data_path, self.config.web.host, self.web_port)
            on_ready(self)
            await self._stop.wait()
            await self._leave()
            self._tasks.check()
        finally:
            await self._shut_down()

    # -- start -------------------------------------------------------------------------------------------------------

    async def _start_control(self, choice: SwarmChoice) -> None:
        self.swarm = choice.swarm
        self.intake = Intake(choice.swarm, self.reporter, self.conduct)
        config = make_control_config(self.config.control, self.identity, choice.swarm, choice.bootstraps)
        handlers = ControlHandlers(
            on_message=self.intake.take_message,
            on_request=self.intake.answer,
            on_presence=self.intake.take_presence,
            on_peer_connected=self._peer_connected,
            on_peer_lost=lambda peer: self.membership.connection_lost(peer) if self.intake.is_open else None,
            on_misbehaviour=self.intake.misbehaved,
            on_bootstrap_failed=self._bootstrap_failed,
            on_reach_changed=lambda: self.membership.addresses_changed() if self.intake.is_open else None,
            on_crashed=self._control_crashed,
        )
        self.control = MeteredControl(Libp2pHost(config, handlers))
        self.reporter.control_bytes = self.control.bytes
        await self.control.start()
        happen, spawn = self.reporter.happen, self._spawn
        self.surroundings = Surroundings(self.config, self.me, choice.swarm, self.control, happen, spawn)
        self.surroundings.start()

    async def _fetch_manifest(self, choice: SwarmChoice) -> bytes:
        def remind(problem: str) -> None:
            self.reporter.happen(
                HappeningKind.NETWORK, f"waiting for the swarm's manifest: {problem}", Severity.WARNING
            )

        return await fetch_manifest(self.control, choice.swarm, remind)

    async def _until_stopped(self, work: Coroutine[None, None, bytes]) -> bytes | None:
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return None
        return task.result()

    async def _assemble(self, signed: bytes, choice: SwarmChoice) -> None:
        """Build what needs the manifest. Nothing of it runs yet."""
        swarm = choice.swarm
        self.manifest, _ = read_manifest_untrusted(signed, swarm)
        self.conduct.expect_parts(self.manifest.parts)
        folder = self.config.data_path
        self._store, repair = await asyncio.to_thread(open_ledger, folder / "ledger.sqlite", self.me, swarm)
        if repair is not None:
            self.reporter.happen(HappeningKind.DISK, repair.text, Severity.WARNING)
        trains = self.config.node.role == TRAINER
        stores = await asyncio.to_thread(open_stores, folder, self._store, self.config.store, contributes=trains)
        self.vectors = await asyncio.to_thread(allocate_vectors, self.config, self.manifest.layout.elements)
        made = self.vectors
        self.state = LocalState(self.manifest, swarm, stores, made.params, made.momentum, made.writing)
        self.exchange = PartExchange(self.me, self.manifest, stores.blobs, stores.snapshots, self.state.memory)
        tensor = self.config.tensor
        link_config = LinkConfig(host=tensor.host, port=tensor.port, congestion_control=tensor.congestion_control)
        self.links = TensorLinks(self.identity, swarm, link_config, self.exchange)
        head = await self.state.restore()
        setting = Setting(
            identity=self.identity,
            rules=self.manifest.rounds,
            authority=self.manifest.authority(swarm),
            trains=trains,
        )
        vote = await asyncio.to_thread(self.state.load_vote)
        loop = asyncio.get_running_loop()
        self.core = RoundCore(setting, head, vote, loop.time(), abstains=abstains(self._store))
        self.head_watch = HeadWatch(self.core)
        self.driver = RoundDriver(
            me=self.me,
            swarm=swarm,
            core=self.core,
            state=self.state,
            exchange=self.exchange,
            control=self.control,
            ports=DriverPorts(
                note=self.reporter.note,
                committed=self._committed,
                begun=lambda: self.compute.round_begun(),
                end_training=lambda number: self.compute.end_training(number),
                behind=lambda behind: self.rejoin.behind(behind),
                forked=lambda forked: self.rejoin.forked(forked.peer),
                dropped=self.intake.drop,
                misbehaved=self.intake.misbehaved,
                disk_failed=self.disk_watch.failed,
                spawn=self._spawn,
            ),
        )
        self.exchange.core, self.exchange.links = self.core, self.links
        self.exchange.ports = ExchangePorts(
            addresses_of=lambda peer: self.membership.tensor_addresses_of(peer),
            pump=self.driver.pump,
            now=self.driver.now,
            link_lost=lambda peer, reason: log.debug("tensor link to %s ended: %s", short_peer_id(peer), reason),
            admit=self.intake.why_refused,
            refusal=self.intake.link_refused,
            late=self.intake.part_dropped,
            spawn=self._spawn,
        )
        self._assemble_compute()
        self.ledger = LedgerSync(
            identity=self.identity, manifest=self.manifest, swarm=swarm, store=self._store, control=self.control
        )
        self.ledger.on_forgotten = lambda cloned: self._spawn(self.driver.forget(for_good=cloned))
        await self.ledger.start()
        self._proof = await asyncio.to_thread(load_proof, self.config, self.me, self.manifest, swarm)
        self._assemble_membership(choice)

    def _assemble_compute(self) -> None:
        self.compute = Compute(
            me=self.me,
            manifest=self.manifest,
            state=self.state,
            ports=ComputePorts(
                frozen=lambda frozen, ready, attendance: self.ready_offer.make(frozen, ready, attendance),
                restarted=self.reporter.trainer_restarted,
                gave_up=self._trainer_gave_up,
                spawn=self._spawn,
                resumed=lambda text: self.reporter.happen(HappeningKind.TRAINER, text, Severity.WARNING),
                waits=partial(self.reporter.happen, HappeningKind.TRAINER),
                left=lambda text: self.reporter.happen(HappeningKind.TRAINER, text, Severity.WARNING),
                measured=lambda event: self._spawn(self._record_measured(event)),
            ),
        )
        if self.config.node.role == TRAINER:
            assert self.vectors.shared is not None
            make = self._make_trainer or choose_trainer(self.manifest)
            folder = self.config.data_path / TRAINER_FOLDER
            self.compute.trainer = make(self.vectors.shared, self.config.trainer, self.compute.take, folder)

    def _assemble_membership(self, choice: SwarmChoice) -> None:
        swarm, rounds = choice.swarm, self.manifest.rounds
        self.gate = Gate(
            me=self.me,
            manifest=self.manifest,
            swarm=swarm,
            standing=self.ledger.ledger.standing,
            voters=lambda: self.core.head.voters,
            bootstraps=choice.bootstraps,
            proof=self._proof,
        )
        tries = BannedTries(self.me, self.ledger.ledger.standing)
        self.membership = Membership(
            me=self.me,
            swarm=swarm,
            control=self.control,
            table=PresenceTable(self.me, swarm, rounds.presence_timeout_s),
            book=load_peer_book(self.config.data_path / PEER_BOOK_FILE, self.me),
            presence_period_s=rounds.presence_period_s,
            ports=MembershipPorts(
                describe=lambda: self.presence.describe(),
                observed=self._observed,
                lost=self._lost,
                misbehaved=self.intake.misbehaved,
                refuses=self.intake.refuses,
                shuns=self.intake.shuns,
                meet=self.gate.meet,
                may_dial=lambda peer: tries.may_try(peer.hex(), self.driver.now()),
                spawn=self._spawn,
                own=self.ledger.meet_presence,
            ),
        )
        self.membership.table.expect(self.core.head.voters, asyncio.get_running_loop().time())
        self.providers = Providers(self.me, swarm, self.state, self.control)
        self.rejoin = Rejoin(
            manifest=self.manifest,
            swarm=swarm,
            control=self.control,
            links=self.links,
            state=self.state,
            folder=self.config.data_path / "catchup",
            core=self.core,
            driver=self.driver,
            head_watch=self.head_watch,
            membership=self.membership,
            providers=self.providers,
            ports=RejoinPorts(
                install=self._install,
                switch=self._switch,
                misbehaved=self.intake.misbehaved,
                donor_failed=lambda peer, reason: self.reporter.metrics.donor_failures[reason].add(),
                happen=partial(self.reporter.happen, HappeningKind.CATCH_UP),
                may_catch_up=lambda: tries.may_try("catch-up", self.driver.now()),
                spawn=self._spawn,
            ),
        )

    async def _serve(self) -> None:
        """Let everything run."""
        config = self.config
        try:
            bound = await self.links.start()
        except OSError as error:
            problem = f"port {config.tensor.port} of {config.tensor.host} cannot be listened on: {error.strerror}"
            fix = "stop the other program, or give --tensor-port another"
            raise ConfigError("tensor.port", problem, fix) from error
        self._open_paths(bound)
        self.presence = OwnPresence(
            config=config,
            identity=self.identity,
            swarm=self.swarm,
            incarnation=self._incarnation,
            control=self.control,
            core=self.core,
            compute=self.compute,
            tensor_addresses=self.paths.reach.announced,
            holdings=lambda: self.providers.holdings,
            admission=self._proof,
        )
        self.ready_offer = ReadyOffer(
            presence=self.presence,
            exchange=self.exchange,
            reached=lambda: self.paths.reach.reached,
            others=lambda: self.membership.table.live().values(),
            announce=lambda: self.membership.announce(),
            pump=self.driver.pump,
        )
        answers = self._assemble_answers()
        ports = IntakePorts(
            round_message=self.driver.receive,
            membership=self.membership,
            ledger=self.ledger,
            answer=answers.answer,
            hang_up=self.links.hang_up,
            gate=self.gate,
            spawn=self._spawn,
        )
        self._begin_reports()
        self.web = WebServer(config.web.host, config.web.port, self.reporter.make_sources(answers))
        self.web_port = await self.web.start()
        for vital in (self.driver.run(), self.membership.beat()):
            self._spawn(vital, vital=True)
        for work in (
            self.membership.discover(),
            self.ledger.keep_up(self.membership.table.live, self._incarnation),
            self.paths.reach.watch(),
            self.providers.run(),
            self.disk_watch.watch(),
            self.reporter.watch_lag(),
            *self._mend_disk(),
        ):
            self._spawn(work)
        self.surroundings.begin(bound, self.paths.reach.set_mapped, self.membership.hear)
        self.intake.open(self.control, ports)
        for one in self.control.peers():
            self._peer_connected(one.peer)
        if config.node.role == TRAINER:
            self._spawn(self.compute.start())
            self._spawn(self.mixing.run())

    def _assemble_answers(self) -> Answers:
        self.mixing = PairMixing(
            manifest=self.manifest,
            driver=self.driver,
            state=self.state,
            exchange=self.exchange,
            membership=self.membership,
            presence=self.presence,
            misbehaved=self.intake.misbehaved,
            tell=self.reporter.pair_told,
        )
        return Answers(
            swarm=self.swarm,
            signed_manifest=self._signed_manifest,
            state=self.state,
            ledger=self.ledger,
            membership=self.membership,
            links=self.links,
            paths=self.paths,
            mixing=self.mixing,
        )

    def _mend_disk(self) -> tuple[Coroutine[object, object, object], ...]:
        tell, donors = partial(self.reporter.happen, HappeningKind.DISK), self.rejoin.catch_up.donors
        return LogRepair(self.state, donors, tell).run(), DiskCheck(self.state, self.links, donors, tell).run()

    def _open_paths(self, bound: Address) -> None:
        interfaces = self.surroundings.interfaces
        ports = make_ports(self.membership, self.control, interfaces, self._reach_changed)
        self.paths = TensorPaths(self.me, self.swarm, self.config.tensor_paths, bound, self.control, self.links, ports)
        self.paths.on_opened, self.paths.on_failed = self.reporter.way_opened, self.reporter.way_failed
        interfaces.subscribe(lambda _: self._interfaces_changed())
        tell = partial(self.reporter.happen, HappeningKind.NETWORK)
        self.line = LineUse(self.config, self.links, lambda: self.paths.reach.reached, tell)
        self._spawn(self.line.run())

    def _begin_reports(self) -> None:
        self.reporter.joined = self.core.head.round > 0 or self.me in self.core.head.voters
        self.reporter.subjects = Subjects(
            config=self.config,
            me=self.me,
            swarm=self.swarm,
            manifest=self.manifest,
            core=self.core,
            state=self.state,
            exchange=self.exchange,
            control=self.control,
            links=self.links,
            line=self.line,
            paths=self.paths,
            surroundings=self.surroundings,
            ledger=self.ledger,
            membership=self.membership,
            compute=self.compute,
            catch_up=self.rejoin.catch_up,
            conduct=self.conduct,
            gate=self.gate,
        )

    # -- stop --------------------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Say so, see the round in work to its end, and let the others vote without this peer."""
        self.presence.leaving = self.reporter.leaving = True
        self.reporter.happen(HappeningKind.PEER_LOST, "leaving the swarm")
        if self.config.node.role == TRAINER:
            await self.compute.stop()
        self.core.leave(self.driver.now())
        self.driver.pump()
        self.membership.announce()
        deadline = asyncio.get_running_loop().time() + LEAVE_TIMEOUT_S
        while asyncio.get_running_loop().time() < deadline and self._is_needed():
            await self.head_watch.wait(0.2)
        await self.state.write_snapshot()
        self.membership.announce()

    def _is_needed(self) -> bool:
        """Whether a round in work, the next vote, or the certificate that only this peer may hold, counts on it."""
        live, head = self.membership.table.live(), self.core.head
        if not live or self._tasks.failure:
            return False
        busy = self.core.phase is not Phase.GATHER and self.me in self.core.view().roster
        others_vote = any(voter in live and not live[voter].leaving for voter in head.voters)
        known = any(live[voter].head_round >= head.round for voter in head.voters if voter in live)
        untold = others_vote and not known and self.me not in head.voters
        return busy or untold or (self.me in head.voters and others_vote)

    async def _shut_down(self) -> None:
        if hasattr(self, "intake"):
            self.intake.close()
        if hasattr(self, "membership"):  # everything was assembled
            self.driver.stop()
            await self._save_peer_book()
        if hasattr(self, "compute") and self.config.node.role == TRAINER:
            await self.compute.stop()
        await self._tasks.end()
        if hasattr(self, "surroundings"):
            await self.surroundings.close()
        if hasattr(self, "state"):
            await self.state.finish()
            self.state.close()
        if hasattr(self, "web"):
            await self.web.stop()
            forget_running(self.config.data_path)
        if hasattr(self, "links"):
            await self.links.stop()
        if hasattr(self, "control"):
            await self.control.stop()
        if hasattr(self, "_store"):
            await asyncio.to_thread(self._store.close)
        if hasattr(self, "vectors"):
            self.vectors.close()

    # -- presence ----------------------------------------------------------------------------------------------------

    def _observed(self, presence: Presence, first: bool) -> None:
        self.core.observe(presence, self.driver.now())
        self.ready_offer.correct()
        self.driver.pump()
        if first:
            self.reporter.happen(HappeningKind.PEER_JOINED, f"{self.reporter.name_of(presence.peer)} is here")
            self._spawn(self._save_peer_book())
        self.reporter.check_clock()
        head = self.core.head
        if presence.head_digest == head.digest and presence.state_root != head.state_root:
            detail = f"round {head.round} has root {presence.state_root.hex()[:16]}, not {head.state_root.hex()[:16]}"
            self.intake.misbehaved(presence.peer, ProtocolError(Refusal.WRONG_BASE, detail))

    def _lost(self, lost: PeerLost) -> None:
        known = self.membership.table.newest(lost.peer)
        self.core.lose(lost.peer, self.driver.now())
        self.links.doubt(lost.peer)
        self.ready_offer.correct()
        self.driver.pump()
        self.reporter.peer_lost(lost.peer, Failure.PEER_LEFT if known and known.leaving else lost.reason)

    def _interfaces_changed(self) -> None:
        self.paths.addresses_changed()
        self.control.refresh()

    def _reach_changed(self) -> None:
        self.reporter.reach_changed(self.paths.reach.describe())
        self.membership.announce()
        self.ready_offer.correct()

    async def _save_peer_book(self) -> None:
        """At every new peer, so that even after kill -9 this one comes back without any bootstrap peer."""
        path = self.config.data_path / PEER_BOOK_FILE
        async with self._book_lock:
            await asyncio.to_thread(save_peer_book, path, self.membership.book.encode())

    def _peer_connected(self, peer: PeerId) -> None:
        if self.intake.is_open and self.intake.admits(peer):
            self.membership.connection_opened(peer)

    def _bootstrap_failed(self, failed: BootstrapFailed) -> None:
        if failed.attempts == 1:
            text = f"{failed.failure}: {failed.address} ({failed.detail}); it is tried again"
            self.reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)

    def _control_crashed(self, detail: str) -> None:
        self.reporter.control_up = False
        failure = f"the control plane has stopped: {detail}"
        self.reporter.happen(HappeningKind.NETWORK, failure, Severity.ERROR)
        self._tasks.fail(failure)

    # -- rounds ------------------------------------------------------------------------------------------------------

    async def _committed(self, certificate: Certificate, head: Head) -> None:
        """A round is applied; the core goes on to the next one when this returns."""
        result = certificate.result
        included = await self.state.settle(result, self.me)
        self.presence.ready = None
        if self.config.node.role == TRAINER and not self.presence.leaving:
            await self.compute.committed(result, included)
        self.reporter.joined = True
        self.reporter.committed(result, bool(included), is_reroot(certificate))
        self._spawn(self._record(certificate))
        self.head_watch.moved()
        self.membership.table.expect(head.voters, asyncio.get_running_loop().time())
        self.membership.announce()

    async def _record(self, certificate: Certificate) -> None:
        """One peer enters the certificate into the ledger: its proposer, or whoever is first where that one is gone."""
        live = list(self.membership.table.live())
        voters = [voter for voter in certificate.result.voters if voter in live or voter == self.me]
        if voters and voters[0] == self.me:
            await self.ledger.write_certificate(certificate, live)

    async def _record_measured(self, event: Evaluated) -> None:
        held_out = HeldOutLoss(round=event.round, loss_nats=event.loss_nats, tokens=event.tokens)
        await self.ledger.write_measurement(held_out, list(self.membership.table.live()))

    async def _switch(self, pledge: Pledge) -> None:
        self.presence.ready = None
        await self.driver.switch(pledge)
        if self.config.node.role == TRAINER:
            await self.compute.rebase()
        self.head_watch.moved()

    async def _install(self, head: Head, params: Float32s, momentum: Float32s) -> None:
        self.presence.ready = None
        await self.driver.install(head, params, momentum)
        self.reporter.joined = True
        self.reporter.happen(HappeningKind.CATCH_UP, f"took over the snapshot of round {head.round}")
        if self.config.node.role == TRAINER:
            self._spawn(self.compute.adopt_base())

    def _trainer_gave_up(self, detail: str) -> None:
        text = f"the trainer is not started again: {detail}"
        self.reporter.happen(HappeningKind.TRAINER, text, Severity.ERROR)
        self.membership.announce()
