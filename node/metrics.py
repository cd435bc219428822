"""Everything that /metrics tells: one table, the `_declare_…` methods of `Metrics`, with a line for every metric.

The names follow Prometheus' conventions (base units, `_total` for counters); all of them begin with `shoal_`. Beside
them stand the client library's `process_…` gauges: memory, CPU time, open files.

Invariants: the set of series is fixed at the start, because every label has a closed set of values and none of them
names a peer or an address; there is no global state, so several daemons fit into one process.
"""

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Generic, TypeVar

import prometheus_client
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from shoal.node.link_port import LinkPath
from shoal.node.port_mapping import MappingFailure, Way
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.node.training import messages
from shoal.protocol.effects import Phase
from shoal.protocol.errors import Failure, Refusal

PREFIX = "shoal_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Plane(StrEnum):
    """What bytes travel on: libp2p streams, or tensor links."""

    CONTROL = "control"
    TENSOR = "tensor"


class Direction(StrEnum):
    SENT = "sent"
    RECEIVED = "received"


class LedgerHeld(StrEnum):
    """Those failures for which a peer writes nothing into the ledger."""

    CHAIN_UNCONFIRMED = Failure.CHAIN_UNCONFIRMED.value
    CHAIN_CLONED = Failure.CHAIN_CLONED.value
    CHAIN_FORKED = Failure.CHAIN_FORKED.value


class StepLoss(StrEnum):
    """Why inner steps were thrown away."""

    BASE_TORN = messages.BASE_TORN
    NOT_FINITE = messages.NOT_FINITE


class TrainerFailure(StrEnum):
    """Those failures after which the trainer is started again."""

    TRAINER_CRASHED = Failure.TRAINER_CRASHED.value
    TRAINER_STALLED = Failure.TRAINER_STALLED.value


class PairFailure(StrEnum):
    """Those failures for which a peer without a quorum trains on alone."""

    NO_PARTNER = Failure.NO_PARTNER.value
    PARTNER_LOST = Failure.PARTNER_LOST.value


class WayFailure(StrEnum):
    """Those failures that end one way to a peer which cannot be dialled."""

    PEER_UNREACHABLE = Failure.PEER_UNREACHABLE.value
    PEER_LOST = Failure.PEER_LOST.value
    PEER_SLOW = Failure.PEER_SLOW.value
    PUNCH_TIMEOUT = Failure.PUNCH_TIMEOUT.value
    PUNCH_REFUSED = Failure.PUNCH_REFUSED.value
    PUNCH_PAUSED = Failure.PUNCH_PAUSED.value
    NO_OBSERVED_ADDRESS = Failure.NO_OBSERVED_ADDRESS.value
    NO_RELAY = Failure.NO_RELAY.value
    RELAY_REFUSED = Failure.RELAY_REFUSED.value
    RELAY_LOST = Failure.RELAY_LOST.value
    RELAY_TIMEOUT = Failure.RELAY_TIMEOUT.value
    RELAY_PAUSED = Failure.RELAY_PAUSED.value


class RelayEnd(StrEnum):
    """Those failures that end a link which this peer passes on for two others."""

    RELAY_HALF_OPEN = Failure.RELAY_HALF_OPEN.value
    RELAY_IDLE = Failure.RELAY_IDLE.value
    RELAY_EXPIRED = Failure.RELAY_EXPIRED.value
    BUDGET_SPENT = Failure.BUDGET_SPENT.value
    PEER_LOST = Failure.PEER_LOST.value
    PEER_UNREACHABLE = Failure.PEER_UNREACHABLE.value


class RelayRefusal(StrEnum):
    """Those refusals that meet who wants a link passed on."""

    NOT_READY = Refusal.NOT_READY.value
    NOT_A_MEMBER = Refusal.NOT_A_MEMBER.value
    BANNED = Refusal.BANNED.value
    DUPLICATE = Refusal.DUPLICATE.value
    EXPIRED = Refusal.EXPIRED.value
    LIMIT = Refusal.LIMIT.value
    BUDGET_SPENT = Refusal.BUDGET_SPENT.value


class Deadline(StrEnum):
    """What may end a phase, by the name that it has in the manifest."""

    GRACE = "grace_s"
    PLAN = "plan_timeout_s"
    SENDER = "sender_timeout_s"
    OWNER = "owner_timeout_s"
    EXCHANGE = "exchange_timeout_s"
    COMMIT = "commit_timeout_s"


class PeerState(StrEnum):
    """Each state includes the next: who takes part is ready, who is ready is live. This peer is counted, too."""

    LIVE = "live"
    READY = "ready"
    PARTICIPATING = "participating"


A = TypeVar("A", bound=StrEnum)
B = TypeVar("B", bound=StrEnum)


class Gauge:
    """A value that is what it is now."""

    def __init__(self, series: prometheus_client.Gauge) -> None:
        self._series = series

    def set(self, value: float) -> None:
        self._series.set(value)


class Counter:
    """A total that only grows."""

    def __init__(self, series: prometheus_client.Counter) -> None:
        self._series = series
        self._followed = 0.0

    def add(self, amount: float = 1.0) -> None:
        self._series.inc(amount)

    def count_to(self, total: float) -> None:
        """Follow a total that somebody else counts; where it falls, it was begun anew and all of it is new."""
        self.add(total - self._followed if total >= self._followed else total)
        self._followed = total


class Histogram:
    """How often a value was at most each bucket's bound."""

    def __init__(self, series: prometheus_client.Histogram) -> None:
        self._series = series

    def observe(self, value: float) -> None:
        self._series.observe(value)

    @property
    def sum(self) -> float:
        """Of all that was observed."""
        samples = (sample for family in self._series.collect() for sample in family.samples)
        return float(sum(sample.value for sample in samples if sample.name.endswith("_sum")))


class Current(Generic[A]):
    """One gauge per value of an enum: 1 for the current one, 0 for the others; None: for all of them."""

    def __init__(self, gauges: Mapping[A, Gauge]) -> None:
        self._gauges = gauges

    def set(self, current: A | None) -> None:
        for value, gauge in self._gauges.items():
            gauge.set(1.0 if value is current else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """One line of the table, for documentation and for the dashboard's test. `name` is what a query calls it."""

    name: str
    kind: str
    help: str
    labels: dict[str, tuple[str, ...]]


# From a tick on one machine to an hour over a slow line.
_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
# Below 10 ms nobody notices; a second costs a heartbeat.
_LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The metrics of one daemon. A metric with labels is a mapping from their values to handles:

    metrics.round.set(7)
    metrics.attempt_failures[Failure.OWNER_LOST].add()
    metrics.wire_bytes[Direction.SENT, Plane.TENSOR].count_to(total)
    """

    def __init__(self) -> None:
        self._table = _Table()
        self._declare_round(self._table)
        self._declare_swarm(self._table)
        self._declare_training(self._table)
        self._declare_traffic(self._table)
        self._declare_disk(self._table)
        self._declare_daemon(self._table)

    def _declare_round(self, table: "_Table") -> None:
        self.round = table.gauge("round", "The round in work: one past the last one that this peer has applied.")
        self.attempt = table.gauge("attempt", "The attempt of that round, from 0.")
        self.phase = table.current("phase", "1 for the phase that this peer is in.", Phase)
        self.rounds_certified = table.counter("rounds_certified", "Certified rounds that this peer has applied.")
        self.attempt_failures = table.counters(
            "round_attempt_failures", "Attempts that ended without a certificate.", ("reason", Failure)
        )
        self.last_failure = table.current(
            "round_last_failure",
            "1 for why the last attempt of the round in work failed; 0 where none has.",
            Failure,
            "reason",
        )
        self.waiting_for = table.gauge(
            "round_waiting_for_peers", "Peers that the phase waits for; the status names them."
        )
        self.phase_age_s = table.gauge("round_phase_age_seconds", "How long the phase lasts already.")
        self.deadline_s = table.gauges(
            "round_deadline_seconds",
            "Seconds until this limit ends the phase; NaN where it does not run.",
            ("deadline", Deadline),
        )
        self.parts_reassigned = table.counters(
            "parts_reassigned", "Parts that went to another owner.", ("reason", Failure)
        )
        self.senders_missing = table.counters(
            "senders_missing", "Parts reduced here without a member's data.", ("reason", Failure)
        )
        self.phase_s = table.histograms("phase_seconds", "How long each phase lasted.", ("phase", Phase), _BUCKETS_S)
        self.round_s = table.histogram("round_seconds", "From one applied round to the next.", _BUCKETS_S)
        self.overhead_s = table.histogram(
            "round_overhead_seconds", "The time of a round in which no inner step was made.", _BUCKETS_S
        )

    def _declare_swarm(self, table: "_Table") -> None:
        self.peers = table.gauges("peers", "Peers of the swarm, with this one.", ("state", PeerState))
        self.peers_lost = table.counters("peers_lost", "Peers that went away.", ("reason", Failure))
        self.voters = table.gauge("voters", "Voters of the round in work.")
        self.voters_live = table.gauge("voters_live", "Those of them that are live; too few certify nothing.")
        self.clock_skew_s = table.gauge(
            "peer_clock_skew_seconds", "The largest difference between a live peer's clock and this one's."
        )

        self.reachability = table.current(
            "reachability", "1 for whether others can dial this peer's tensor port.", ReachState, "state"
        )
        self.reachability_reason = table.current("reachability_reason", "1 for why that is so.", ReachReason, "reason")
        self.nat_mapping = table.current(
            "nat_mapping", "1 for what routers make of the tensor port, as members see it.", NatMapping, "state"
        )
        self.mapped_ports = table.gauges(
            "mapped_ports", "1 for a port that the router leads to this machine.", ("plane", Plane)
        )
        self.port_mapping_failures = table.counters_by_two(
            "port_mapping_failures",
            "How often the router did not map the ports when it was asked.",
            ("way", Way),
            ("reason", MappingFailure),
        )
        self.lan_peers = table.gauge("lan_peers", "Peers of the swarm that were found on the LAN.")

        self.control_reachability = table.current(
            "control_reachability", "1 for whether others can dial the control port.", ReachState, "state"
        )
        self.relays = table.gauge("relays", "Other peers that carry control connections to this one.")
        self.relay_reservations = table.gauge("relay_reservations", "Peers that are reached through this one.")
        self.relay_circuits = table.gauge("relay_circuits", "Control connections of others that this peer carries.")
        self.relayed_bytes = table.counter("relayed_bytes", "Bytes of such connections, both ways.")
        self.links = table.gauges("tensor_links", "Open tensor links, by how they came about.", ("path", LinkPath))
        self.tensor_relay_links = table.gauge(
            "tensor_relay_links", "Tensor links of two other members that this peer passes on."
        )
        self.tensor_relay_opened = table.counter("tensor_relay_opened", "How many such links it has begun to pass on.")
        self.tensor_relay_bytes = table.counter("tensor_relay_bytes", "Bytes of such links, both ways.")
        self.tensor_relay_budget_bytes = table.gauge(
            "tensor_relay_budget_bytes", "How many more of these may pass within the hour."
        )
        self.tensor_relay_ends = table.counters(
            "tensor_relay_ends", "Such links that did not end in order.", ("reason", RelayEnd)
        )
        self.tensor_relay_refusals = table.counters(
            "tensor_relay_refusals",
            "Asks for such a link, and connections for one, that were refused.",
            ("reason", RelayRefusal),
        )
        self.ways_opened = table.counters(
            "ways_opened", "Peers that could not be dialled and were linked all the same.", ("path", LinkPath)
        )
        self.way_failures = table.counters(
            "way_failures", "Ways to peers that cannot be dialled which led nowhere.", ("reason", WayFailure)
        )

    def _declare_training(self, table: "_Table") -> None:
        self.loss = table.gauge("loss", "The trainer's last loss; NaN before the first one.")
        self.loss.set(math.nan)
        text = "Held-out loss of the certified base that this peer has last measured; NaN before."
        self.held_out_loss = table.gauge("held_out_loss", text)
        self.held_out_loss.set(math.nan)
        text = "Held-out loss of the newest certified base that a member has measured, by its word; NaN before."
        self.swarm_held_out_loss = table.gauge("swarm_held_out_loss", text)
        self.swarm_held_out_loss.set(math.nan)
        self.swarm_held_out_round = table.gauge("swarm_held_out_round", "The round of that base; 0 before.")
        self.tokens = table.counter("tokens", "Tokens that this peer has trained on.")
        self.tokens_per_s = table.gauge("tokens_per_second", "How fast it trains now.")
        self.inner_steps = table.counter("inner_steps", "Inner steps that this peer has made.")
        text = "Of these, those that were thrown away before they were in a contribution."
        self.steps_dropped = table.counters("inner_steps_dropped", text, ("reason", StepLoss))
        self.pairs_mixed = table.counter("pairs_mixed", "Mixings with another peer while there was no quorum.")
        text = "Times that it trained on without a quorum and mixed with nobody."
        self.pair_failures = table.counters("pair_failures", text, ("reason", PairFailure))
        self.trainer_running = table.gauge("trainer_running", "1 while the trainer process makes inner steps.")
        self.trainer_restarts = table.counters(
            "trainer_restarts", "How often the trainer process was started again.", ("reason", TrainerFailure)
        )

    def _declare_traffic(self, table: "_Table") -> None:
        self.wire_bytes = table.counters_by_two(
            "wire_bytes", "Bytes on the wire, with all overhead.", ("direction", Direction), ("plane", Plane)
        )
        self.payload_bytes = table.counters(
            "tensor_payload_bytes", "Bytes of tensors on tensor links, without any overhead.", ("direction", Direction)
        )
        self.caps_bits_per_s = table.gauges(
            "tensor_cap_bits_per_second",
            "What tensors may take of this machine's line now; 0 without a cap.",
            ("direction", Direction),
        )
        self.contribution_bytes = table.counter("contribution_bytes", "Encoded bytes of this peer's contributions.")
        self.contribution_fp32_bytes = table.counter(
            "contribution_fp32_bytes", "What the same contributions take as float32; the ratio is the compression."
        )
        self.refusals = table.counters_by_two(
            "refusals", "What came from outside and was refused.", ("reason", Refusal), ("plane", Plane)
        )
        self.hang_ups = table.counters(
            "hang_ups", "Peers that were hung up on because they went on sending such.", ("reason", Refusal)
        )
        self.peers_refused = table.gauge(
            "peers_refused", "Peers that get no connection for now, because they went on so."
        )

    def _declare_disk(self, table: "_Table") -> None:
        self.rounds_behind = table.gauge("rounds_behind", "Rounds that the swarm has certified and this peer lacks.")
        self.catching_up = table.gauge("catching_up", "1 while this peer fetches and replays what it missed.")
        self.fetched_bytes = table.counter("catch_up_bytes", "Bytes of updates and snapshots that were fetched.")
        self.donor_failures = table.counters(
            "donor_failures", "Donors that did not give what they were asked for.", ("reason", Failure)
        )
        self.snapshot_round = table.gauge("snapshot_round", "The round of the newest snapshot on this disk.")
        self.oldest_round = table.gauge("oldest_round", "From here on the disk can rebuild every certified round.")
        self.ledger_entries = table.gauge("ledger_entries", "Entries of the ledger on this disk.")
        self.ledger_era = table.gauge("ledger_era", "The era of the ledger: old ones are dropped when it grows.")
        self.ledger_held = table.current(
            "ledger_held", "1 for why this peer writes nothing into the ledger; 0 where it does.", LedgerHeld, "reason"
        )
        self.blob_bytes = table.gauge("blob_store_bytes", "Bytes of updates, contributions and snapshots on this disk.")
        self.abstaining = table.gauge("abstaining", "1 while this peer does not vote because its vote record was lost.")
        self.disk_errors = table.counter("disk_errors", "How often this disk has kept the peer from voting.")
        self.disk_stopped = table.gauge(
            "disk_stopped", "1 while this disk keeps the peer from voting; the status says why."
        )

    def _declare_daemon(self, table: "_Table") -> None:
        self.loop_lag_s = table.histogram(
            "event_loop_lag_seconds", "How late the event loop ran a timer: what all of its work waits.", _LAG_BUCKETS_S
        )
        build = prometheus_client.Gauge(
            f"{PREFIX}build_info",
            "Always 1; the labels tell the build.",
            ["version", "python"],
            registry=table.registry,
        )
        build.labels(version("shoal"), platform.python_version()).set(1)
        prometheus_client.ProcessCollector(registry=table.registry)

    @property
    def table(self) -> tuple[Declaration, ...]:
        """Every metric whose labels have closed sets of values, in the order of declaration."""
        return tuple(self._table.declarations)

    def render(self) -> bytes:
        """The text exposition, to be sent as CONTENT_TYPE. Some milliseconds of work: keep it for a second."""
        return prometheus_client.generate_latest(_WithoutCreated(self._table.registry))


class _Table:
    """Makes the handles. Every series exists from the start, so that a first failure shows as an increase."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.declarations: list[Declaration] = []

    def gauge(self, name: str, text: str) -> Gauge:
        self._declare("gauge", name, text)
        return Gauge(prometheus_client.Gauge(PREFIX + name, text, registry=self.registry))

    def gauges(self, name: str, text: str, label: tuple[str, type[A]]) -> dict[A, Gauge]:
        self._declare("gauge", name, text, label)
        family = prometheus_client.Gauge(PREFIX + name, text, [label[0]], registry=self.registry)
        return {value: Gauge(family.labels(value)) for value in label[1]}

    def current(self, name: str, text: str, values: type[A], label: str = "") -> Current[A]:
        return Current(self.gauges(name, text, (label or name, values)))

    def counter(self, name: str, text: str) -> Counter:
        self._declare("counter", f"{name}_total", text)
        return Counter(prometheus_client.Counter(PREFIX + name, text, registry=self.registry))

    def counters(self, name: str, text: str, label: tuple[str, type[A]]) -> dict[A, Counter]:
        self._declare("counter", f"{name}_total", text, label)
        family = prometheus_client.Counter(PREFIX + name, text, [label[0]], registry=self.registry)
        return {value: Counter(family.labels(value)) for value in label[1]}

    def counters_by_two(
        self, name: str, text: str, one: tuple[str, type[A]], two: tuple[str, type[B]]
    ) -> dict[tuple[A, B], Counter]:
        self._declare("counter", f"{name}_total", text, one, two)
        family = prometheus_client.Counter(PREFIX + name, text, [one[0], two[0]], registry=self.registry)
        return {(a, b): Counter(family.labels(a, b)) for a in one[1] for b in two[1]}

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        self._declare("histogram", name, text)
        return Histogram(prometheus_client.Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry))

    def histograms(
        self, name: str, text: str, label: tuple[str, type[A]], buckets: tuple[float, ...]
    ) -> dict[A, Histogram]:
        self._declare("histogram", name, text, label)
        family = prometheus_client.Histogram(PREFIX + name, text, [label[0]], buckets=buckets, registry=self.registry)
        return {value: Histogram(family.labels(value)) for value in label[1]}

    def _declare(self, kind: str, name: str, text: str, *labels: tuple[str, type[StrEnum]]) -> None:
        values = {label: tuple(value.value for value in enum) for label, enum in labels}
        self.declarations.append(Declaration(name=PREFIX + name, kind=kind, help=text, labels=values))


class _WithoutCreated(Collector):
    """The registry without the `_created` series, which double it; the library's own switch is a global one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Family]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
