"""What the tests of the daemon's pieces share: a swarm within one process, and a log that real keys have certified.

A `Peer` is the daemon without libp2p, torch and web server: the same pieces, wired alike, over control planes in memory
and real tensor links on loopback. A test runs those of its tasks that it is about."""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shoal.dht.peer_book import PeerBook
from shoal.node.answers import Answers
from shoal.node.blobs import BlobStore
from shoal.node.compute import Compute, ComputePorts
from shoal.node.conduct import Conduct
from shoal.node.config import BOOTSTRAP, TRAINER, NodeConfig, NodeTable
from shoal.node.control import ControlConfig, ControlHandlers, ControlStopped
from shoal.node.exchange import ExchangePorts, PartExchange
from shoal.node.happenings import HappeningFeed
from shoal.node.intake import Intake, IntakePorts
from shoal.node.ledger_store import LedgerStore, compute_checksum
from shoal.node.ledger_sync import LedgerSync
from shoal.node.link_port import Address, LinkConfig
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState, Stores
from shoal.node.membership import Membership, MembershipPorts
from shoal.node.metered_control import MeteredControl
from shoal.node.metrics import Metrics
from shoal.node.own_presence import OwnPresence
from shoal.node.providers import Providers
from shoal.node.reporting import Reporter
from shoal.node.round_driver import DriverPorts, RoundDriver
from shoal.node.snapshots import SnapshotStore
from shoal.node.training.messages import Ready as TrainerReady
from shoal.protocol.admission import AdmissionProof
from shoal.protocol.attendance import NO_ATTENDANCE, Attendance
from shoal.protocol.codecs import Float32s
from shoal.protocol.contribution import Frozen
from shoal.protocol.effects import Behind, Forked, Note
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import (
    Admission,
    Draft,
    Manifest,
    Rounds,
    Task,
    Training,
    genesis_head,
    make_manifest,
    read_manifest_untrusted,
    sign_manifest,
)
from shoal.protocol.messages import Certificate, Presence, Ready, digest_record, encode_message, sign_ready
from shoal.protocol.presence import PeerLost, PresenceTable
from shoal.protocol.quorum import Head, is_reroot
from shoal.protocol.replica import Replica
from shoal.protocol.round_state import Offer, Setting
from shoal.protocol.rounds import RoundCore
from shoal.protocol.state import SnapshotIndex, chunk_digests
from shoal.protocol.wire import encode_record
from tests.sim.memory_control import MemoryNetwork
from tests.unit.node.path_samples import (
    make_catch_up,
    make_gate,
    make_mixing,
    make_paths,
    make_subjects,
)
from tests.unit.node.planes import MakeControl, in_memory
from tests.unit.protocol.samples import IDENTITIES, PEERS, make_update

PATIENCE_S = 60.0
TICK_S = 0.005
LINKS = LinkConfig(host="127.0.0.1", tick_s=0.05, goodbye_timeout_s=2.0)
# Nothing that a test waits for is a time-out, unless it is about one.
RULES = Rounds(
    peers_min=2,
    grace_s=30.0,
    part_elements=1024,
    plan_timeout_s=30.0,
    sender_timeout_s=30.0,
    owner_timeout_s=30.0,
    exchange_timeout_s=60.0,
    commit_timeout_s=30.0,
    presence_period_s=0.5,
    presence_timeout_s=60.0,
    snapshot_every=8,
    rounds_kept=64,
)
LEDGER = "ledger.sqlite"
TINY_ELEMENTS = 3000  # three parts, one chunk a vector
WIDE_ELEMENTS = 700_000  # three chunks a vector


async def wait_until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for what no event of the piece under test tells."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(patience_s):
        while not condition():
            tick = loop.create_future()
            handle = loop.call_later(TICK_S, tick.set_result, None)
            try:
                await tick
            finally:
                handle.cancel()


def make_samples(
    elements: int = TINY_ELEMENTS,
    founders: int = 2,
    admission: str = "open",
    training: Training | None = None,
    **rules: object,
) -> "Swarm":
    """A swarm that its first `founders` peers vote in; `rules` are other values of RULES."""
    layout = Layout(tensors=(TensorSpec(name="w", shape=(elements,), init="uniform", std=0.02),))
    part_elements = RULES.part_elements if elements == TINY_ELEMENTS else 1 << 18
    changed = replace(RULES, **{"part_elements": part_elements, **rules})  # type: ignore[arg-type]
    draft = Draft(
        name="samples",
        task=Task(kind="none"),
        seed=3,
        rounds=changed,
        training=training or Training(),
        admission=Admission(rule=admission),
    )
    signed = sign_manifest(make_manifest(draft, layout, PEERS[0], PEERS[:founders]), IDENTITIES[0])
    manifest, swarm = read_manifest_untrusted(signed)
    return Swarm(manifest=manifest, id=swarm, signed=signed)


@dataclass(slots=True, kw_only=True)
class Swarm:
    """What the peers of one test have in common."""

    manifest: Manifest
    id: bytes
    signed: bytes
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    addresses: dict[PeerId, Address] = field(default_factory=dict)  # of tensor ports
    proofs: dict[PeerId, AdmissionProof] = field(default_factory=dict)  # what peers show, where it is not open

    def addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        return (self.addresses[peer],) if peer in self.addresses else ()


# -- a certified log -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The rounds 1..n of a swarm, certified by its founders. `heads` begins with round 0; `states` are (params,
    momentum) of the rounds that were asked for."""

    certificates: tuple[Certificate, ...]
    blobs: dict[bytes, bytes]
    heads: tuple[Head, ...]
    states: dict[int, tuple[Float32s, Float32s]]

    def index(self, number: int) -> SnapshotIndex:
        """The snapshot index of a kept state."""
        return index_of(number, *self.states[number])


def index_of(number: int, params: Float32s, momentum: Float32s) -> SnapshotIndex:
    """The snapshot index of any state."""
    digests = chunk_digests(params) + chunk_digests(momentum)
    return SnapshotIndex(round=number, elements=params.size, digests=digests)


def make_chain(swarm: Swarm, rounds: int, kept: tuple[int, ...] = (), seed: int = 0) -> Chain:
    """Rounds of random updates. The same arguments give the same chain, which is made once."""
    return _make_chain(swarm.signed, rounds, kept, seed)


@lru_cache(maxsize=8)
def _make_chain(signed: bytes, rounds: int, kept: tuple[int, ...], seed: int) -> Chain:
    manifest, swarm = read_manifest_untrusted(signed)
    elements = manifest.layout.elements
    replica = Replica(manifest, np.zeros(elements, np.float32), np.zeros(elements, np.float32))
    heads = [genesis_head(manifest, swarm, replica.reset())]
    certificates, blobs, states = [], {}, {}
    for number in range(1, rounds + 1):
        certificate, encoded = make_update(manifest, heads[-1], 1000 * seed + number, swarm)
        result = certificate.result
        root = replica.apply(result, encoded)
        heads.append(Head(round=number, digest=digest_record(result), state_root=root, voters=result.voters))
        certificates.append(certificate)
        blobs.update(encoded)
        if number in kept:
            states[number] = replica.params.copy(), replica.momentum.copy()
    return Chain(certificates=tuple(certificates), blobs=blobs, heads=tuple(heads), states=states)


def open_stores(folder: Path) -> Stores:
    """The stores of a data folder; close its ledger in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    return Stores(
        ledger=LedgerStore.open(folder / LEDGER),
        blobs=BlobStore(folder / "blobs"),
        snapshots=SnapshotStore(folder / "snapshots"),
        snapshots_kept=2,
    )


def open_state(swarm: Swarm, folder: Path) -> LocalState:
    """A state over a data folder, not restored yet."""
    params, momentum = (np.zeros(swarm.manifest.layout.elements, np.float32) for _ in range(2))
    return LocalState(swarm.manifest, swarm.id, open_stores(folder), params, momentum)


def fill_folder(swarm: Swarm, folder: Path, chain: Chain) -> None:
    """What the disk of a peer holds that has taken part in all of `chain`, with snapshots of its kept states."""
    state = open_state(swarm, folder)
    for digest, raw in chain.blobs.items():
        state.stores.blobs.write(digest, raw)
    for number, vectors in chain.states.items():
        state.stores.snapshots.write(chain.index(number), *vectors)
    state.stores.ledger.close()
    # One transaction for all rounds: the disk is waited for once.
    rows = [(one.result.round, digest_record(one.result), encode_record(one)) for one in chain.certificates]
    checked = [(*row, compute_checksum(*row)) for row in rows]
    with closing(sqlite3.connect(folder / LEDGER)) as connection, connection:
        connection.executemany("INSERT INTO certificates VALUES (?, ?, ?, ?)", checked)


# -- a peer ----------------------------------------------------------------------------------------------------------


class Peer:
    """One peer of a `Swarm`. What its pieces tell the daemon is kept in lists."""

    compute: Compute
    answer: Callable[[PeerId, bytes], Awaitable[bytes]]  # a test may put another one in its place

    def __init__(
        self, swarm: Swarm, number: int, folder: Path, *, trains: bool, make_control: MakeControl = in_memory
    ) -> None:
        self.swarm = swarm
        self.identity = IDENTITIES[number]
        self.me = self.identity.peer
        self.folder = folder
        role = TRAINER if trains else BOOTSTRAP
        self.config = NodeConfig(node=NodeTable(data_dir=str(folder), name=f"peer{number}", role=role))
        self.notes: list[Note] = []
        self.commits: list[Head] = []
        self.behinds: list[Behind] = []
        self.forks: list[Forked] = []
        self.other_logs: list[PeerId] = []
        self.disk_failures: list[tuple[Failure, str]] = []
        self.misbehaviours: list[tuple[PeerId, Refusal]] = []
        self.tensor_refusals: list[tuple[PeerId | None, Refusal]] = []
        self.dropped: list[tuple[PeerId, Refusal]] = []
        self.lost: list[PeerLost] = []
        self.seen: list[tuple[PeerId, bool]] = []
        self.restarts: list[Failure] = []
        self.given_up: list[str] = []
        self.offers: list[Frozen] = []
        self.turns: list[tuple[PeerId | None, Failure | None]] = []  # of mixing without a quorum
        self.reach_changes: list[str] = []
        self.hosts: tuple[str, ...] = ()  # of this machine, as its pieces are told
        self.donor_failures: Counter[PeerId] = Counter()
        self.defects: list[BaseException] = []
        self.served: Counter[bytes] = Counter()
        self._tasks: set[asyncio.Task[object]] = set()

        self.state = open_state(swarm, folder)
        stores = self.state.stores
        self.reporter = Reporter(Metrics(), HappeningFeed())
        self.conduct = Conduct(self.me)
        self.conduct.expect_parts(swarm.manifest.parts)
        self.now_s, self.wall_s = time.monotonic, time.time  # the clocks of `conduct` and of the gate
        self.intake = Intake(swarm.id, self.reporter, self.conduct, lambda: self.now_s())
        config = ControlConfig(identity=self.identity, swarm=swarm.id, listen=("/ip4/127.0.0.1/tcp/0",))
        handlers = ControlHandlers(
            on_message=self.intake.take_message,
            on_request=self.intake.answer,
            on_presence=self.intake.take_presence,
            on_peer_connected=self._connected,
            on_peer_lost=self._disconnected,
            on_misbehaviour=self.intake.misbehaved,
        )
        self.control = MeteredControl(make_control(swarm.network, config, handlers))
        self.reporter.control_bytes = self.control.bytes
        self.exchange = PartExchange(self.me, swarm.manifest, stores.blobs, stores.snapshots, self.state.memory)
        self.links = TensorLinks(self.identity, swarm.id, LINKS, self.exchange)
        self.ledger = LedgerSync(
            identity=self.identity, manifest=swarm.manifest, swarm=swarm.id, store=stores.ledger, control=self.control
        )

    async def start(self) -> None:
        """Restore, wire, listen, and carry out what the round core wants."""
        head = await self.state.restore()
        await self.ledger.start()
        await self.control.start()
        self.swarm.addresses[self.me] = await self.links.start()
        self._wire(head)
        await self.providers.refresh()
        self._count_served()
        ports = IntakePorts(
            round_message=self.driver.receive,
            membership=self.membership,
            ledger=self.ledger,
            answer=lambda peer, raw: self.answer(peer, raw),
            hang_up=self.links.hang_up,
            gate=self.gate,
            spawn=self.spawn,
        )
        self.intake.open(self.control, ports)
        self.spawn(self.driver.run())

    def _wire(self, head: Head) -> None:
        swarm, manifest, loop = self.swarm, self.swarm.manifest, asyncio.get_running_loop()
        setting = Setting(identity=self.identity, rules=manifest.rounds, authority=manifest.authority(swarm.id))
        self.core = RoundCore(setting, head, self.state.load_vote(), loop.time())
        self.driver = RoundDriver(
            me=self.me,
            swarm=swarm.id,
            core=self.core,
            state=self.state,
            exchange=self.exchange,
            control=self.control,
            ports=DriverPorts(
                note=self._note,
                committed=self._committed,
                begun=self._begun,
                end_training=lambda number: self.compute.end_training(number),
                behind=self.behinds.append,
                forked=self.forks.append,
                dropped=lambda peer, refusal: self.intake.drop(peer, refusal),
                misbehaved=self.misbehaved,
                disk_failed=lambda reason, detail: self.disk_failed(reason, detail),
                spawn=self.spawn,
            ),
        )
        self.exchange.core, self.exchange.links = self.core, self.links
        self.exchange.ports = ExchangePorts(
            addresses_of=self._addresses_of,
            pump=self.driver.pump,
            now=self.driver.now,
            link_lost=lambda peer, reason: None,
            admit=self.intake.why_refused,
            refusal=self._refused,
            late=self._dropped,
            spawn=self.spawn,
        )
        self.compute = Compute(
            me=self.me,
            manifest=manifest,
            state=self.state,
            ports=ComputePorts(
                frozen=self.offer,
                restarted=lambda reason, detail: self.restarts.append(reason),
                gave_up=self.given_up.append,
                spawn=self.spawn,
            ),
        )
        self.gate = make_gate(self)
        self.paths = make_paths(self, swarm.addresses[self.me])
        self.presence = OwnPresence(
            config=self.config,
            identity=self.identity,
            swarm=swarm.id,
            incarnation=1,
            control=self.control,
            core=self.core,
            compute=self.compute,
            tensor_addresses=self.paths.reach.announced,
            holdings=lambda: self.providers.holdings,
            admission=swarm.proofs.get(self.me),
        )
        self.providers = Providers(self.me, swarm.id, self.state, self.control)
        self.membership = Membership(
            me=self.me,
            swarm=swarm.id,
            control=self.control,
            table=PresenceTable(self.me, swarm.id, manifest.rounds.presence_timeout_s),
            book=PeerBook(self.me),
            presence_period_s=manifest.rounds.presence_period_s,
            ports=MembershipPorts(
                describe=self.presence.describe,
                observed=self._observed,
                lost=self._lost,
                misbehaved=self.misbehaved,
                refuses=self.intake.refuses,
                shuns=self.intake.shuns,
                meet=self.gate.meet,
                spawn=self.spawn,
                own=self.ledger.meet_presence,
            ),
        )
        self.catch_up = make_catch_up(self)
        self.mixing = make_mixing(self)
        self.answers = Answers(
            swarm=swarm.id,
            signed_manifest=swarm.signed,
            state=self.state,
            ledger=self.ledger,
            membership=self.membership,
            links=self.links,
            paths=self.paths,
            mixing=self.mixing,
        )
        self.answer = self.answers.answer
        self.reporter.subjects = make_subjects(self)

    async def stop(self) -> None:
        """End everything, in the daemon's order."""
        self.intake.close()
        self.driver.stop()
        if hasattr(self.compute, "trainer"):
            await self.compute.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.state.finish()
        await self.links.stop()
        await self.control.stop()
        self.state.stores.ledger.close()

    def spawn(self, work: Coroutine[object, object, object]) -> None:
        """A task that ends with the peer; what it raises is a defect, unless it outlived the control plane."""
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: "asyncio.Task[object]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ControlStopped):
            self.defects.append(error)

    # -- what a test does with it ------------------------------------------------------------------------------------

    @property
    def params(self) -> Float32s:
        return self.state.replica.params

    async def contribute(self, seed: int) -> Frozen:
        """Freeze made-up work, anchored at the base, and become ready with it."""
        noise = np.random.default_rng(seed).standard_normal(self.params.size, dtype=np.float32)
        frozen = await self.state.freeze(self.params - np.float32(0.01) * noise)
        self.offer(frozen, TrainerReady(round=frozen.round, steps=10, tokens=1000, loss_mean=1.0, batches_done=10))
        return frozen

    def offer(self, frozen: Frozen, ready: TrainerReady, attendance: Attendance = NO_ATTENDANCE) -> None:
        """What the daemon does with a frozen contribution."""
        if frozen.round != self.core.round:
            return
        said = Ready(
            round=frozen.round,
            base_root=self.core.head.state_root,
            contribution_root=frozen.root,
            tokens=ready.tokens,
            steps=max(1, ready.steps),
            norm=frozen.norm,
            owns=True,
            attendance=attendance,
        )
        signed = sign_ready(self.identity, self.swarm.id, said)
        if self.core.offer(Offer(signed=signed, digests=frozen.digests), self.driver.now()):
            self.presence.ready, self.exchange.frozen = signed, frozen
            self.offers.append(frozen)
            self.membership.announce()
        self.driver.pump()

    def meet(self, other: "Peer") -> None:
        """Take the other one's presence, as if it had just been gossiped."""
        self.membership.take_presence(encode_message(self.swarm.id, other.presence.describe()), other.me)

    async def connect(self, other: "Peer") -> None:
        """A control connection to the other one."""
        await self.control.connect(other.control.addresses())

    def misbehaved(self, peer: PeerId, error: ProtocolError) -> None:
        self.misbehaviours.append((peer, error.refusal))
        self.intake.misbehaved(peer, error)

    # -- its pieces' ports -------------------------------------------------------------------------------------------

    def _count_served(self) -> None:
        serve = self.exchange.serve

        async def counting(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            self.served[digest] += 1
            return await serve(peer, digest)

        self.exchange.serve = counting  # type: ignore[method-assign]

    def _note(self, note: Note) -> None:
        self.notes.append(note)
        self.reporter.note(note)

    async def _committed(self, certificate: Certificate, head: Head) -> None:
        result = certificate.result
        included = await self.state.settle(result, self.me)
        self.presence.ready = None
        if hasattr(self.compute, "trainer"):
            await self.compute.committed(result, included)
        self.reporter.committed(result, bool(included), is_reroot(certificate))
        self.commits.append(head)
        self.membership.announce()

    def _begun(self) -> None:
        if hasattr(self.compute, "trainer"):
            self.compute.round_begun()

    def disk_failed(self, reason: Failure, detail: str) -> None:
        self.disk_failures.append((reason, detail))
        self.reporter.disk_stopped(reason, detail)

    def _refused(self, peer: PeerId | None, refusal: Refusal) -> None:
        self.tensor_refusals.append((peer, refusal))
        self.intake.link_refused(peer, refusal)

    def _dropped(self, peer: PeerId, refusal: Refusal) -> None:
        self.dropped.append((peer, refusal))
        self.intake.part_dropped(peer, refusal)

    def _addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        return () if self.intake.refuses(peer) else self.swarm.addresses_of(peer)

    def _observed(self, presence: Presence, first: bool) -> None:
        self.seen.append((presence.peer, first))
        self.core.observe(presence, self.driver.now())
        self.driver.pump()

    def _lost(self, lost: PeerLost) -> None:
        self.lost.append(lost)
        self.core.lose(lost.peer, self.driver.now())
        self.driver.pump()

    async def _wait_past(self, number: int, timeout_s: float) -> bool:
        try:
            await wait_until(lambda: self.core.head.round > number, timeout_s)
        except TimeoutError:
            return False
        return True

    def _connected(self, peer: PeerId) -> None:
        if self.intake.is_open and self.intake.admits(peer):
            self.membership.connection_opened(peer)

    def _disconnected(self, peer: PeerId) -> None:
        if self.intake.is_open:
            self.membership.connection_lost(peer)


@asynccontextmanager
async def open_peer(
    swarm: Swarm, number: int, folder: Path, *, trains: bool = False, make_control: MakeControl = in_memory
) -> AsyncIterator[Peer]:
    """A started peer with the data folder `folder`/`number`; stopped in the end, whatever happened."""
    peer = Peer(swarm, number, folder / str(number), trains=trains, make_control=make_control)
    try:
        await peer.start()
        yield peer
    finally:
        await peer.stop()
    assert peer.defects == []


@asynccontextmanager
async def open_peers(folder: Path, count: int, swarm: Swarm | None = None) -> AsyncIterator[list[Peer]]:
    """Connected trainers, all of them founders, whose presences are gossiped."""
    swarm = make_samples(founders=count) if swarm is None else swarm
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(open_peer(swarm, number, folder, trains=True)) for number in range(count)
        ]
        for at, peer in enumerate(peers):
            for other in peers[:at]:
                await peer.connect(other)
            peer.spawn(peer.membership.beat())
        await wait_until(lambda: all(len(peer.membership.table.live()) == count - 1 for peer in peers))
        yield peers
