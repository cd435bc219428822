"""What a peer tells people and programs about itself: one value, its JSON form, and what follows from it.

`Status` is what `shoal status`, the live page and the health checks are made from. The daemon builds one on request;
nothing here knows the daemon.

Invariants: every list has a bound; the JSON form reads back to the same value, and what is not exactly a Status is
refused; whether a peer is healthy or ready is a pure function of its Status.
"""

import dataclasses
import http.client
import json
import math
import types
import typing
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shoal.node.happenings import Happening, HappeningKind
from shoal.node.port_mapping import MappingState
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.protocol.errors import InputError, ShoalError

PEERS_SHOWN_MAX = 256
LOSS_POINTS_MAX = 512
WARNINGS_MAX = 16
STATUS_BYTES_MAX = 1 << 20
FETCH_TIMEOUT_S = 5.0


class TrainerState(StrEnum):
    NONE = "none"  # a bootstrap peer has none
    WAITING = "waiting"  # for a script of the person's own, which attaches itself
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"  # frozen for an exchange, or before the first state is there
    STALLED = "stalled"
    STOPPED = "stopped"  # given up: it failed too often


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One row of the peers table. `peer` is the text form of the id, `name` and `agent` are what that peer says."""

    peer: str
    name: str
    agent: str
    me: bool
    alive: bool
    ready: bool
    participating: bool
    voter: bool
    owner: bool  # others can dial it, so it may own parts
    tokens_per_s: float
    head_round: int
    address: str
    path: str  # how the tensor link to it came about, "" where none is open


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Whom a phase waits for."""

    peer: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureStatus:
    """The last failure of its kind, and what was done about it: `attempt` of `round` failed, or in that attempt a part
    went to another owner or was reduced without a member. `peer` is the one that failed, where one did."""

    kind: HappeningKind
    reason: str
    peer: str
    round: int
    attempt: int
    age_s: float
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """The round in work. `phase_s` is how long its phase lasts already, `progress` the share of it that is done,
    `deadline_s` the seconds until it ends, `deadline` the manifest's name of that limit: both are None where nothing
    runs out."""

    round: int
    attempt: int
    phase: str
    phase_s: float
    progress: float | None
    deadline_s: float | None
    deadline: str | None
    waiting_for: tuple[Wait, ...]
    voters: int
    voters_live: int
    votes_needed: int
    head_digest: str
    state_root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    round: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The mean loss of the base of a round on data that nobody trains on, and e to that where it is in nats."""

    round: int
    loss: float | None
    perplexity: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a member says in the ledger that it has measured of the base of a round, over `tokens` tokens of its own
    held-out data. Nobody can check the figure."""

    round: int
    loss: float | None
    perplexity: float | None
    tokens: int
    peer: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """The trainer. `steps` of `steps_planned` are made in this round; tokens are counted since the daemon's start.
    `held_out` is what this peer has last measured of a certified base, `steps_dropped` counts inner steps that were
    thrown away. `loss_unit` is what all losses of the swarm's task are in, empty where nobody says; `unused` names the
    settings of this machine that the task ignores. `pairs_mixed` counts mixings with other peers while there was no
    quorum, `pair_failure` is why the last turn of that kind was none, or empty."""

    state: TrainerState
    device: str
    restarts: int
    error: str
    steps: int
    steps_planned: int
    tokens: int
    tokens_per_s: float
    loss_first: float | None
    loss_last: float | None
    loss_history: tuple[LossPoint, ...]
    held_out: HeldOut | None = None
    steps_dropped: int = 0
    loss_unit: str = ""
    unused: tuple[str, ...] = ()
    pairs_mixed: int = 0
    pair_failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficStatus:
    """Bytes since the daemon's start; `fp32_bytes` is what the same contributions take uncompressed. The rates are
    those of the fastest peer in recent large payloads, None before there were any."""

    control_sent_bytes: int
    control_received_bytes: int
    tensor_sent_bytes: int
    tensor_received_bytes: int
    contribution_bytes: int
    fp32_bytes: int
    tensor_send_bytes_per_s: float | None = None
    tensor_receive_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineStatus:
    """Tensors on this machine's line, in Mbit/s. The caps are those in force, None without one; `caps_until` is the
    time of this machine's day at which others hold, None where none ever do. The rates are those of payloads in the
    last minute, None before they are measured. `relay_withheld` where only the caps, at whatever hours, keep this peer
    from passing on tensors for others."""

    upload_cap_mbit: float | None = None
    download_cap_mbit: float | None = None
    caps_until: str | None = None
    sent_mbit: float | None = None
    received_mbit: float | None = None
    relay_withheld: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CatchUpStatus:
    """`active` while missed rounds or a snapshot are fetched and replayed."""

    active: bool
    rounds_behind: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatus:
    """`failing` while writes fail or the free space is below the configured minimum: such a peer does not vote."""

    failing: bool
    errors: int
    free_bytes: int
    blob_bytes: int
    ledger_entries: int
    snapshot_round: int
    oldest_round: int  # from here on this disk can rebuild every round
    vector_bytes: int = 0  # of the model's vectors, where these lie on the disk: in files that have no name


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressStatus:
    """One address of the tensor port, and what other peers have found there."""

    address: str
    state: ReachState
    reason: ReachReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachStatus:
    """Whether others can dial this peer's tensor port, and so whether it may own parts; `mapping` is what routers on
    the way make of that port."""

    state: ReachState
    reason: ReachReason
    mapping: NatMapping
    addresses: tuple[AddressStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlStatus:
    """Whether others can dial this peer's control port, at which `relays` it is reached while they cannot, and what it
    relays for others itself."""

    state: ReachState = ReachState.UNKNOWN
    addresses: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    relaying: bool = False
    reservations: int = 0
    circuits: int = 0
    relayed_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """Whether the router leads others to this machine's ports: from `addresses`, or why not."""

    state: MappingState
    reason: str
    detail: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonCount:
    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRelayStatus:
    """What this peer passes on of other members' tensor links; `active` while it would, `budget_bytes` is what it may
    still pass on within the hour."""

    active: bool = False
    links: int = 0
    relayed_bytes: int = 0
    budget_bytes: int = 0
    refusals: tuple[ReasonCount, ...] = ()
    ends: tuple[ReasonCount, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything that a person or a program asks a running daemon. `failures` are the newest of each kind, the newest
    first; `measured` is what members have measured of the newest bases, the newest first."""

    version: str
    peer: str
    name: str
    swarm: str
    swarm_name: str
    uri: str
    role: str
    at_s: float
    uptime_s: float
    joined: bool  # it holds the swarm's state at some certified round
    leaving: bool
    control_up: bool
    round: RoundStatus
    training: TrainingStatus
    measured: tuple[Measured, ...] = ()
    traffic: TrafficStatus
    line: LineStatus = LineStatus()
    catch_up: CatchUpStatus
    disk: DiskStatus
    reach: ReachStatus
    router: RouterStatus
    control: ControlStatus = ControlStatus()
    tensor_relay: TensorRelayStatus = TensorRelayStatus()
    peers: tuple[PeerStatus, ...]
    rounds_certified: int
    aborted: tuple[ReasonCount, ...]
    failures: tuple[FailureStatus, ...]
    warnings: tuple[str, ...]
    happenings: tuple[Happening, ...]

    def to_json(self) -> str:
        """One JSON object; numbers that are not finite become null."""
        return json.dumps(_plain(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str | bytes) -> "Status":
        """Inverse of `to_json`; raises StatusError for everything that is not exactly a Status."""
        try:
            tree = json.loads(raw, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise StatusError("status", f"is no JSON: {error}") from error
        status: Status = _read(cls, tree, "status")
        return status


class StatusError(ShoalError):
    """Text that should be a Status and is not; most likely from another version."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")


class NoDaemonError(InputError):
    """No daemon answers at the address that a person gave, or that is the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`ok`, or why not, in sentences."""

    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.reasons


def judge_health(status: Status) -> Verdict:
    """Whether the daemon does its work. What is wrong here will not mend itself: a restart or a person is needed."""
    reasons = []
    if not status.control_up:
        reasons.append("the control plane has stopped")
    if status.training.state is TrainerState.STOPPED:
        reasons.append(f"the trainer has stopped after {status.training.restarts} restarts: {status.training.error}")
    if status.disk.failing:
        reasons.append(f"the disk is full or fails: {status.disk.errors} errors, {status.disk.free_bytes} bytes free")
    return Verdict(reasons=tuple(reasons))


def judge_readiness(status: Status) -> Verdict:
    """Whether this peer can take part in the round in work. What is missing here usually comes by itself."""
    reasons = list(judge_health(status).reasons)
    now = status.round
    if status.leaving:
        reasons.append("it is leaving the swarm")
    if not status.joined:
        reasons.append("it has no state of the swarm yet")
    elif status.catch_up.active or status.catch_up.rounds_behind > 1:
        reasons.append(f"it is {status.catch_up.rounds_behind} rounds behind and catches up")
    if now.voters_live < now.votes_needed:
        reasons.append(f"no quorum: {now.voters_live} of {now.voters} voters are live, {now.votes_needed} are needed")
    if status.training.state is TrainerState.WAITING:
        reasons.append("no training script is attached")
    elif status.training.state in (TrainerState.STARTING, TrainerState.STALLED):
        reasons.append(f"the trainer is {status.training.state}")
    return Verdict(reasons=tuple(reasons))


class LossHistory:
    """The loss of every round in at most LOSS_POINTS_MAX points: when they are full, every other one goes."""

    def __init__(self) -> None:
        self._kept: list[LossPoint] = []
        self._last: LossPoint | None = None
        self._rounds = 0
        self._stride = 1

    def add(self, round_number: int, loss: float) -> None:
        """The loss of a round; rounds come in ascending order, and only the last one may come again."""
        point = LossPoint(round=round_number, loss=loss)
        if self._last is None or self._last.round < round_number:
            self._rounds += 1
            if len(self._kept) == LOSS_POINTS_MAX - 1:
                self._kept = self._kept[::2]
                self._stride *= 2
        elif self._kept[-1].round == round_number:
            self._kept.pop()
        self._last = point
        if (self._rounds - 1) % self._stride == 0:
            self._kept.append(point)

    @property
    def points(self) -> tuple[LossPoint, ...]:
        """In ascending order of rounds; the first and the last round are always there."""
        if self._last is None or self._kept[-1] is self._last:
            return tuple(self._kept)
        return (*self._kept, self._last)


def keep_peers(rows: Iterable[PeerStatus]) -> tuple[PeerStatus, ...]:
    """At most PEERS_SHOWN_MAX rows for a Status: this peer first, then who takes part, then who is live."""
    ordered = sorted(rows, key=lambda row: (not row.me, not row.participating, not row.alive, row.name, row.peer))
    return tuple(ordered[:PEERS_SHOWN_MAX])


def clean_text(text: str, chars_max: int = 200) -> str:
    """Text that a peer chose, fit for a terminal: without control characters, escapes and direction marks."""
    shown = "".join(character for character in text if character.isprintable())
    return shown if len(shown) <= chars_max else shown[: chars_max - 1] + "…"


def describe_unused(names: Sequence[str]) -> str:
    """Settings of this machine that the swarm's task ignores; one file may serve several swarms."""
    are, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return f"{' and '.join(names)} {are} set, and the task of this swarm does not use {them}"


def fetch_status(host: str, port: int, timeout_s: float = FETCH_TIMEOUT_S) -> Status:
    """The Status of the daemon whose web port this is; raises NoDaemonError or StatusError."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/status.json"
    # No proxy: one from the environment would be asked for this very machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            raw = answer.read(STATUS_BYTES_MAX + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        fix = "start one with `shoal up`, or name its web port with --web-port"
        raise NoDaemonError(url, f"no daemon answers: {reason or type(error).__name__}", fix) from error
    if len(raw) > STATUS_BYTES_MAX:
        raise StatusError(url, f"answers with more than {STATUS_BYTES_MAX} bytes")
    return Status.from_json(raw)


def _plain(value: object) -> Any:
    """The JSON tree of a value; Any is the border to the json module."""
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _read(hint: Any, tree: Any, where: str) -> Any:
    """The value of type `hint` in a JSON tree."""
    if isinstance(hint, types.UnionType):
        (inner,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        return None if tree is None else _read(inner, tree, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(tree, list):
            raise StatusError(where, "is no list")
        return tuple(_read(typing.get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(tree))
    if dataclasses.is_dataclass(hint):
        return _read_record(hint, tree, where)
    if issubclass(hint, StrEnum):
        if tree not in [member.value for member in hint]:
            raise StatusError(where, f"is {tree!r}, no {hint.__name__}")
        return hint(tree)
    if hint is float:
        tree = math.nan if tree is None else tree
        if type(tree) is int and abs(tree) < 2**53:
            tree = float(tree)
    if type(tree) is not hint:
        raise StatusError(where, f"is {type(tree).__name__}, not {hint.__name__}")
    return tree


def _read_record(cls: Any, tree: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(tree, dict) or tree.keys() != hints.keys():
        odd = sorted(tree.keys() ^ hints.keys()) if isinstance(tree, dict) else []
        problem = f"lacks or does not know: {', '.join(map(str, odd))}" if odd else "is no object"
        raise StatusError(where, problem)
    return cls(**{name: _read(hint, tree[name], f"{where}.{name}") for name, hint in hints.items()})
