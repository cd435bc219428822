"""The manifest: a run's signed configuration. Its hash is the swarm id, and everybody in a swarm holds the same one.

A person writes a draft (TOML); `shoal swarm create` adds the model's layout, the owner and the founders, and signs it.
The founders are the voters of round 1.

Invariant: the canonical bytes of a manifest hash to the swarm id; what shapes the global state stands nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, urlsplit

from blake3 import blake3

from shoal.protocol.admission import AdmissionRule, Ticket, parse_ticket
from shoal.protocol.aggregators import AGGREGATORS
from shoal.protocol.attendance import WEIGHTS, WORK
from shoal.protocol.codecs import CODECS, UPDATE_CODECS, Float32Codec
from shoal.protocol.errors import ManifestError, ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, PeerId, verify_signature
from shoal.protocol.layout import Layout
from shoal.protocol.messages import PARTS_MAX, ROSTER_MAX, VOTERS_MAX, PartResult, Peer, Result
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterRates
from shoal.protocol.quorum import Authority, Head, QuorumRule, list_parts
from shoal.protocol.state import STATE_ELEMENTS_MAX
from shoal.protocol.tables import locate, parse_toml, read_table
from shoal.protocol.wire import (
    DELTA_BYTES_MAX,
    U63,
    Bound,
    Bytes64,
    Choice,
    decode_record_untrusted,
    encode_record,
)

PART_ELEMENTS, PART_ELEMENTS_MAX = 1 << 18, 1 << 20
PARTS_WANTED = 32  # so many can be shared evenly among a dozen owners; each costs every peer some messages
URI_SCHEME = "shoal"
# Those of node/training/strategy.py.
DILOCO, OVERLAPPED, DELAYED, EAGER = STRATEGIES = ("diloco", "overlapped", "delayed", "eager")
ADAMW, MUON, MTDAO = INNER_OPTIMIZERS = ("adamw", "muon", "mtdao")  # those of node/training/optimizers.py
CONSTANT, COSINE, LINEAR = SCHEDULES = ("constant", "cosine", "linear")  # those of node/training/schedules.py
BOOTSTRAPS_MAX = 16
BATCH_SIZE_MAX = 65_536
NESTEROV, ADAM = "nesterov", "adam"  # of those in protocol/outer_step.py
FRAGMENTS_MAX = 64
MOMENTUM_EVERY_MAX = 1024
Seconds = Annotated[float, Bound(0.05, 86_400)]
Name = Annotated[str, Bound(1, 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained: an entry of the trainer's task table and its options as canonical JSON text."""

    kind: Name
    options: Annotated[str, Bound(2, 16_384)] = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The inner loop. A peer is ready after `inner_steps`, or after `round_time_s` with at least `steps_min`.

    Where the strategy is "overlapped" it trains on while its contribution is exchanged, for `overlap_steps` at most,
    and `mixing` is the share of its own parameters that it keeps when the new base comes. Where it is "delayed" it
    keeps all that it has done meanwhile, upon the new base; "eager" does that, too, and trains meanwhile from its own
    estimate of the new base.

    Each peer warms up by its own steps. With another `schedule` than "constant" the learning rate falls from round to
    round, for all peers alike, to the share `learning_rate_end` of itself after `schedule_rounds` rounds.

    After every `evaluate_every` rounds one of those who contributed measures the base on held-out data; 0: nobody.

    With `divide_data` those who were in a round draw from shares of the data that have nothing in common, until the
    next one: for members who all have the same data.

    Where for `gossip_after_s` so few voters were in sight that no round can be certified, peers that are ready train
    on, and first mix what they have with one another, in pairs; 0: they wait."""

    strategy: Annotated[str, Choice(STRATEGIES)] = DILOCO
    inner_steps: Annotated[int, Bound(1, 100_000)] = 100
    steps_min: Annotated[int, Bound(1, 100_000)] = 5
    round_time_s: Seconds = 600.0
    batch_size: Annotated[int, Bound(1, BATCH_SIZE_MAX)] = 16
    learning_rate: Annotated[float, Bound(1e-9, 10)] = 1e-3
    warmup_steps: Annotated[int, Bound(0, 1_000_000)] = 20
    weight_decay: Annotated[float, Bound(0, 10)] = 0.1
    gradient_clip: Annotated[float, Bound(1e-6, 1e6)] = 1.0
    missed_rounds_max: Annotated[int, Bound(1, 1000)] = 8
    overlap_steps: Annotated[int, Bound(0, 100_000)] = 0
    mixing: Annotated[float, Bound(0, 0.99)] = 0.5
    inner_optimizer: Annotated[str, Choice(INNER_OPTIMIZERS)] = ADAMW
    schedule: Annotated[str, Choice(SCHEDULES)] = CONSTANT
    schedule_rounds: Annotated[int, Bound(0, 1_000_000)] = 0
    learning_rate_end: Annotated[float, Bound(0, 1)] = 0.1
    evaluate_every: Annotated[int, Bound(0, 1_000_000)] = 4
    divide_data: bool = False
    gossip_after_s: Annotated[float, Bound(0, 86_400)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """The outer step (DiLoCo, arXiv 2311.08105): Nesterov, learning rate 0.7, momentum 0.9 or 0.8 for short runs.

    No element of the momentum gets beyond `momentum_clip`; 0: it has no limit. With `momentum_every` N a step is 1/N as
    long and the momentum is applied in every Nth round, of fragments at every Nth turn.

    With "adam" (FedAdam, arXiv 2003.00295) `momentum` is the factor of the first moment and `second_moment` that of the
    second one; a step of an element is `learning_rate` long at most, as a rule, and `epsilon` is added to the root."""

    optimizer: Annotated[str, Choice(tuple(OUTER_OPTIMIZERS))] = "nesterov"
    learning_rate: Annotated[float, Bound(0, 10)] = 0.7
    momentum: Annotated[float, Bound(0, 1)] = 0.8
    momentum_clip: Annotated[float, Bound(0, 1e6)] = 0.0
    momentum_every: Annotated[int, Bound(1, MOMENTUM_EVERY_MAX)] = 1
    second_moment: Annotated[float, Bound(0, 1)] = 0.99
    epsilon: Annotated[float, Bound(1e-9, 1)] = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The round protocol: who is waited for, and every deadline by its name."""

    peers_min: Annotated[int, Bound(1, ROSTER_MAX)] = 2
    newcomers_max: Annotated[int, Bound(1, ROSTER_MAX)] = 8
    voters_max: Annotated[int, Bound(1, VOTERS_MAX)] = VOTERS_MAX
    grace_s: Annotated[float, Bound(0, 3600)] = 5.0
    quorum: Annotated[str, Choice(tuple(rule.value for rule in QuorumRule))] = QuorumRule.MAJORITY.value
    codec: Annotated[str, Choice(tuple(CODECS))] = "int8"  # of contributions
    update_codec: Annotated[str, Choice(UPDATE_CODECS)] | None = None  # of updates; None: that of contributions
    aggregator: Annotated[str, Choice(tuple(AGGREGATORS))] = "mean"
    part_elements: Annotated[int, Bound(256, PART_ELEMENTS_MAX)] = PART_ELEMENTS
    plan_timeout_s: Seconds = 6.0
    sender_timeout_s: Seconds = 10.0
    owner_timeout_s: Seconds = 15.0
    exchange_timeout_s: Seconds = 60.0
    commit_timeout_s: Seconds = 20.0
    presence_period_s: Seconds = 2.0
    presence_timeout_s: Seconds = 8.0
    reroot_after_s: Annotated[float, Bound(0, 30 * 86_400)] = 86_400.0  # 0: never
    snapshot_every: Annotated[int, Bound(1, 10_000)] = 8
    rounds_kept: Annotated[int, Bound(2, 100_000)] = 64
    residual_kept: Annotated[float, Bound(0, 1)] = 1.0  # the share of the residual that goes into the next contribution
    fragments: Annotated[int, Bound(1, FRAGMENTS_MAX)] = 1  # a round exchanges every so manieth part
    weights: Annotated[str, Choice(WEIGHTS)] = WORK  # what a contribution weighs by (protocol.attendance)

    @property
    def codec_out(self) -> str:
        """The codec of updates."""
        return self.codec if self.update_codec is None else self.update_codec

    @property
    def update_ratio(self) -> float:
        """The size of an encoded update by that of a contribution."""
        update, contribution = (CODECS[name].encoded_bytes(self.part_elements) for name in (self.codec_out, self.codec))
        return update / contribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Who may take part, besides the founders and the owner (protocol.admission)."""

    rule: Annotated[str, Choice(tuple(rule.value for rule in AdmissionRule))] = AdmissionRule.OPEN.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The part of a manifest that a person writes."""

    name: Name
    task: Task
    seed: U63 = 0
    training: Training = field(default_factory=Training)
    outer: Outer = field(default_factory=Outer)
    rounds: Rounds = field(default_factory=Rounds)
    admission: Admission = field(default_factory=Admission)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A field of a draft's `table` that has an effect with some values of another one, `choice`, alone. With the rest
    it may have the value `idle`, which says what is so anyway; None: there is none."""

    table: str
    field: str
    choice: str
    values: tuple[str, ...]
    idle: float | None = None

    def is_met(self, draft: Draft, *, is_named: bool) -> bool:
        table = getattr(draft, self.table)
        value = getattr(table, self.field)
        if not is_named and value == getattr(type(table)(), self.field):
            return True
        return getattr(table, self.choice) in self.values or value == self.idle

    def describe_fault(self, draft: Draft) -> tuple[str, str]:
        """What is wrong, and what to do."""
        chosen = getattr(getattr(draft, self.table), self.choice)
        *most, last = (f'"{value}"' for value in self.values)
        usable = f"{', '.join(most)} or {last}" if most else last
        return f"is not for the {self.choice} {chosen}", f"use {self.choice} = {usable}, or leave it out"


_LOSSY = tuple(name for name in CODECS if name != Float32Codec.name)  # what a residual is left by
CONDITIONS = (
    Condition(table="training", field="overlap_steps", choice="strategy", values=(OVERLAPPED, DELAYED, EAGER), idle=0),
    Condition(table="training", field="mixing", choice="strategy", values=(OVERLAPPED,)),
    Condition(table="training", field="schedule_rounds", choice="schedule", values=(COSINE, LINEAR), idle=0),
    Condition(table="training", field="learning_rate_end", choice="schedule", values=(COSINE, LINEAR), idle=1),
    Condition(table="outer", field="momentum", choice="optimizer", values=(NESTEROV, ADAM), idle=0),
    Condition(table="outer", field="momentum_clip", choice="optimizer", values=(NESTEROV,), idle=0),
    Condition(table="outer", field="momentum_every", choice="optimizer", values=(NESTEROV,), idle=1),
    Condition(table="outer", field="second_moment", choice="optimizer", values=(ADAM,)),
    Condition(table="outer", field="epsilon", choice="optimizer", values=(ADAM,)),
    Condition(table="rounds", field="residual_kept", choice="codec", values=_LOSSY, idle=1),
    # Who may lie may not say by themselves that the others are gone.
    Condition(table="rounds", field="reroot_after_s", choice="quorum", values=(QuorumRule.MAJORITY.value,), idle=0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    name: Name
    task: Task
    layout: Layout
    seed: U63
    training: Training
    outer: Outer
    rounds: Rounds
    admission: Admission
    owner: Peer
    founders: Annotated[tuple[Peer, ...], Bound(1, VOTERS_MAX)]

    @property
    def parts(self) -> int:
        """How many parts the flat vector has."""
        parts: int = -(-self.layout.elements // self.rounds.part_elements)
        return parts

    def list_parts(self, round_number: int) -> range:
        """The parts that a round exchanges, by their place in its plan and its result: those of one fragment. No round
        has more of them than the first."""
        return list_parts(self.parts, self.rounds.fragments, round_number)

    def match_parts(self, result: Result) -> Iterator[tuple[int, PartResult]]:
        """The parts of the vector, each with what the result says of it; none where it changes the voters alone."""
        return zip(self.list_parts(result.round), result.parts, strict=False)

    def outer_rates(self, round_number: int) -> OuterRates:
        """The numbers of this round's outer step."""
        return OuterRates(
            learning_rate=self.outer.learning_rate,
            momentum=self.outer.momentum,
            momentum_clip=self.outer.momentum_clip,
            momentum_every=self.outer.momentum_every,
            second_moment=self.outer.second_moment,
            epsilon=self.outer.epsilon,
            turn=(round_number - 1) // self.rounds.fragments % self.outer.momentum_every,
        )

    def part_range(self, part: int) -> tuple[int, int]:
        """First element and one past the last of a part of the flat vector."""
        first = part * self.rounds.part_elements
        return first, min(first + self.rounds.part_elements, self.layout.elements)

    def contribution_bytes(self, part: int) -> int:
        """The exact encoded length of this part of a contribution."""
        return self._encoded_bytes(self.rounds.codec, part)

    def update_bytes(self, part: int) -> int:
        """The exact encoded length of this part of a certified update."""
        return self._encoded_bytes(self.rounds.codec_out, part)

    def _encoded_bytes(self, codec: str, part: int) -> int:
        first, end = self.part_range(part)
        return CODECS[codec].encoded_bytes(end - first)

    @property
    def admission_rule(self) -> AdmissionRule:
        return AdmissionRule(self.admission.rule)

    @property
    def quorum(self) -> QuorumRule:
        return QuorumRule(self.rounds.quorum)

    def authority(self, swarm: bytes) -> Authority:
        """By whose word a round of this swarm is decided."""
        return Authority(
            swarm=swarm,
            rule=self.quorum,
            owner=self.owner,
            parts=self.parts,
            fragments=self.rounds.fragments,
            may_declare=self.rounds.reroot_after_s > 0 and self.quorum is QuorumRule.MAJORITY,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedManifest:
    manifest: Annotated[bytes, Bound(1, DELTA_BYTES_MAX)]
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmUri:
    """shoal://<swarm-id>?bootstrap=<multiaddr>[&bootstrap=…][&invite=<ticket>]"""

    swarm: bytes
    bootstraps: tuple[str, ...] = ()
    ticket: Ticket | None = None

    def __str__(self) -> str:
        pieces = [f"bootstrap={quote(address, safe='/:.')}" for address in self.bootstraps]
        pieces += [] if self.ticket is None else [f"invite={self.ticket}"]
        return f"{URI_SCHEME}://{self.swarm.hex()}" + (f"?{'&'.join(pieces)}" if pieces else "")


def parse_draft(text: str, options: str) -> Draft:
    """The draft in a TOML document. `options` is the task table's own keys, as canonical JSON."""
    document = parse_toml(text, ManifestError)
    task = document.get("task")
    if isinstance(task, dict):
        document["task"] = {"kind": task.get("kind", ""), "options": options}
    draft = read_table(Draft, document, "", text, ManifestError)
    for one in CONDITIONS:
        if not one.is_met(draft, is_named=one.field in document.get(one.table, {})):
            raise ManifestError(locate(text, one.table, one.field), *one.describe_fault(draft))
    return draft


def task_kind(text: str) -> str:
    """Which task a draft names; raises ManifestError as `task_options` does."""
    kind: str = _read_task(text)["kind"]
    return kind


def task_options(text: str) -> dict[str, Any]:
    """Everything in [task] but its kind: what the task itself validates."""
    return {key: value for key, value in _read_task(text).items() if key != "kind"}


def _read_task(text: str) -> dict[str, Any]:
    task = parse_toml(text, ManifestError).get("task", {})
    if not isinstance(task, dict):
        raise ManifestError(locate(text, "", "task"), "is not one table", 'write it as [task] with kind = "byte_gpt"')
    if not isinstance(task.get("kind", ""), str):
        raise ManifestError(locate(text, "task", "kind"), "is no text", 'write it as kind = "byte_gpt"')
    if "kind" not in task:
        raise ManifestError("task.kind", "is missing", 'add [task] with kind = "byte_gpt"')
    return task


def size_parts(draft: Draft, text: str, elements: int) -> Draft:
    """The draft, of which `text` is the document, with parts of a size that fits a model of so many parameters, unless
    it says which."""
    rounds = parse_toml(text, ManifestError).get("rounds", {})
    if "part_elements" in rounds:
        return draft
    return replace(draft, rounds=replace(draft.rounds, part_elements=choose_part_elements(elements)))


def choose_part_elements(elements: int) -> int:
    """The size of parts for a model of so many parameters: what a part costs apart from its bytes counts little."""
    size = PART_ELEMENTS
    while size < PART_ELEMENTS_MAX and size * PARTS_WANTED < elements:
        size *= 2
    return size


def make_manifest(draft: Draft, layout: Layout, owner: PeerId, founders: tuple[PeerId, ...]) -> Manifest:
    """The whole manifest; raises ManifestError where the pieces do not fit each other."""
    check_draft(draft)
    parts = -(-layout.elements // draft.rounds.part_elements)
    if parts > PARTS_MAX:
        fix = f"use at least {-(-layout.elements // PARTS_MAX)}"
        raise ManifestError("rounds.part_elements", f"makes {parts} parts, at most {PARTS_MAX}", fix)
    if layout.elements > STATE_ELEMENTS_MAX:
        problem = f"has {layout.elements} parameters, at most {STATE_ELEMENTS_MAX} fit a snapshot's index"
        raise ManifestError("task", problem, "choose a smaller model")
    for codec in (CODECS[draft.rounds.codec], CODECS[draft.rounds.codec_out]):
        if draft.rounds.part_elements % codec.block_elements:
            problem = f"is no multiple of {codec.block_elements}, the block of {codec.name}"
            raise ManifestError("rounds.part_elements", problem, "round it up to one")
    if draft.rounds.fragments > parts:
        fix = f"use at most {parts}, or smaller parts (rounds.part_elements)"
        raise ManifestError("rounds.fragments", f"is {draft.rounds.fragments}, of a vector with {parts} parts", fix)
    if len(founders) > draft.rounds.voters_max:
        problem = f"is {draft.rounds.voters_max}, but {len(founders)} founders vote in the first round"
        raise ManifestError("rounds.voters_max", problem, "raise it or name fewer founders")
    _check_steps(draft.training, layout)
    return Manifest(
        name=draft.name,
        task=draft.task,
        layout=layout,
        seed=draft.seed,
        training=draft.training,
        outer=draft.outer,
        rounds=draft.rounds,
        admission=draft.admission,
        owner=owner,
        founders=founders,
    )


def check_draft(draft: Draft) -> None:
    """Raises ManifestError where its fields do not fit each other, as far as that does not depend on the model."""
    if draft.rounds.codec_out not in UPDATE_CODECS:
        problem = f"is missing, and {draft.rounds.codec} leaves out most values of an update for good"
        raise ManifestError("rounds.update_codec", problem, f"use one of: {', '.join(UPDATE_CODECS)}")
    if draft.rounds.presence_timeout_s < 2 * draft.rounds.presence_period_s:
        fix = "use at least twice rounds.presence_period_s"
        raise ManifestError("rounds.presence_timeout_s", "leaves no room for one lost heartbeat", fix)
    rounds = draft.rounds
    for name, limit_s in (("sender_timeout_s", rounds.sender_timeout_s), ("owner_timeout_s", rounds.owner_timeout_s)):
        if limit_s > rounds.exchange_timeout_s:
            ends = f"the whole exchange ends after rounds.exchange_timeout_s, {rounds.exchange_timeout_s:g}"
            fix = "lower it, or raise rounds.exchange_timeout_s"
            raise ManifestError(f"rounds.{name}", f"is {limit_s:g}, and {ends}", fix)
    for one in CONDITIONS:
        if not one.is_met(draft, is_named=False):
            raise ManifestError(f"{one.table}.{one.field}", *one.describe_fault(draft))
    if draft.training.steps_min > draft.training.inner_steps:
        raise ManifestError("training.steps_min", "is more than training.inner_steps", "lower it")
    _check_overlap(draft.training)
    if draft.training.strategy == EAGER and draft.rounds.fragments > 1:
        # A trainer does not know which parts the next round exchanges.
        problem = f"is {draft.rounds.fragments}, and an eager peer estimates the next base as a whole"
        raise ManifestError("rounds.fragments", problem, f'use 1, or strategy = "{DELAYED}"')
    if draft.outer.optimizer == ADAM and draft.training.strategy == EAGER:
        problem = f"is {EAGER}, whose estimate wants an outer step that is the same for every element"
        raise ManifestError("training.strategy", problem, f'use "{DELAYED}", or another outer.optimizer')
    _check_gossip(draft)


def _check_gossip(draft: Draft) -> None:
    if not draft.training.gossip_after_s:
        return
    field, fix = "training.gossip_after_s", "use 0"
    if draft.rounds.quorum != QuorumRule.MAJORITY:
        problem = "is for members who do not lie: of a pair nobody could tell which one does"
        raise ManifestError(field, problem, f'{fix}, or rounds.quorum = "{QuorumRule.MAJORITY}"')
    if draft.rounds.fragments > 1:
        problem = "would mix one fragment alone, that of the open round, and the others never"
        raise ManifestError(field, problem, f"{fix}, or rounds.fragments = 1")


def _check_overlap(training: Training) -> None:
    if training.strategy != DILOCO and not 1 <= training.overlap_steps < training.inner_steps:
        problem = f"is {training.overlap_steps}, and training.inner_steps is {training.inner_steps}"
        raise ManifestError("training.overlap_steps", problem, f"use 1 to {training.inner_steps - 1}")


def _check_steps(training: Training, layout: Layout) -> None:
    if training.inner_optimizer == MUON and not any(spec.is_hidden for spec in layout.tensors):
        problem = f"is {MUON}, but no matrix of the model stands in a numbered layer"
        raise ManifestError("training.inner_optimizer", problem, f"use {ADAMW}, or number the layers' names")
    if training.schedule != CONSTANT and not training.schedule_rounds:
        fix = "give the number of rounds after which the learning rate has reached its end"
        raise ManifestError("training.schedule_rounds", f"is missing for the schedule {training.schedule}", fix)


def sign_manifest(manifest: Manifest, owner: Identity) -> bytes:
    """The file that a swarm's peers hold."""
    assert owner.peer == manifest.owner, "only its owner signs a manifest"
    raw = encode_record(manifest)
    return encode_record(SignedManifest(manifest=raw, signature=owner.sign("manifest", blake3(raw).digest(), raw)))


def read_manifest_untrusted(signed: bytes, swarm: bytes | None = None) -> tuple[Manifest, bytes]:
    """The manifest and its swarm id; raises ProtocolError unless it is whole, signed, and (if given) of `swarm`."""
    outside = decode_record_untrusted(SignedManifest, signed, DELTA_BYTES_MAX)
    digest = blake3(outside.manifest).digest()
    if swarm is not None and digest != swarm:
        raise ProtocolError(Refusal.WRONG_SWARM, f"manifest of {digest.hex()[:16]}, wanted {swarm.hex()[:16]}")
    manifest = decode_record_untrusted(Manifest, outside.manifest, DELTA_BYTES_MAX)
    verify_signature(manifest.owner, "manifest", digest, outside.manifest, outside.signature)
    if manifest.parts > PARTS_MAX:
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"manifest.rounds.part_elements makes {manifest.parts} parts")
    if manifest.rounds.fragments > manifest.parts:
        detail = f"manifest.rounds.fragments is {manifest.rounds.fragments}, of {manifest.parts} parts"
        raise ProtocolError(Refusal.OUT_OF_RANGE, detail)
    if manifest.rounds.codec_out not in UPDATE_CODECS:
        detail = f"manifest.rounds.update_codec is nil, and {manifest.rounds.codec} is not for updates"
        raise ProtocolError(Refusal.OUT_OF_RANGE, detail)
    return manifest, digest


def genesis_head(manifest: Manifest, swarm: bytes, state_root: bytes) -> Head:
    """Round 0: the state that the manifest's seed gives, voted on by its founders."""
    return Head(round=0, digest=swarm, state_root=state_root, voters=manifest.founders)


def parse_uri(text: str) -> SwarmUri:
    """Inverse of `str(SwarmUri)`; raises UriError naming the piece that is wrong."""
    example = f"{URI_SCHEME}://<64 hex digits>?bootstrap=/ip4/…/tcp/…/p2p/12D3KooW…"
    try:
        split = urlsplit(text.strip())
    except ValueError as error:  # a bracket out of place, or letters that become separators when normalised
        raise UriError("URI", f"{text[:64]!r} is malformed", f"write {example}") from error
    if split.scheme != URI_SCHEME:
        raise UriError("scheme", f"{text[:64]!r} does not start with {URI_SCHEME}://", f"write {example}")
    try:
        swarm = bytes.fromhex(split.netloc)
    except ValueError:
        swarm = b""
    if len(swarm) != 32:
        raise UriError("swarm id", f"{split.netloc[:80]!r} is not 64 hex digits", "copy the URI whole")
    query = parse_qs(split.query, keep_blank_values=True)
    if unknown := [key for key in query if key not in ("bootstrap", "invite")]:
        fix = "only bootstrap=<multiaddr> and invite=<invitation> may stand there"
        raise UriError("query", f"{unknown[0]!r} is no known parameter", fix)
    bootstraps = tuple(query.get("bootstrap", ()))
    if len(bootstraps) > BOOTSTRAPS_MAX:
        raise UriError("bootstrap", f"{len(bootstraps)} addresses", f"give at most {BOOTSTRAPS_MAX}")
    for address in bootstraps:
        if not address.startswith("/") or "/p2p/" not in address:
            raise UriError("bootstrap", f"{address!r} is no multiaddr with a peer id", f"write {example}")
    invites = query.get("invite", [])
    if len(invites) > 1:
        raise UriError("invite", f"{len(invites)} invitations", "give one")
    return SwarmUri(swarm=swarm, bootstraps=bootstraps, ticket=parse_ticket(invites[0]) if invites else None)
