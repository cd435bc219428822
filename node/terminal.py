"""What the terminal shows: a status as a table, as plain lines, or live, and the demo's view of several peers at once.

rich is imported where it is used, so that commands that need none of this start fast.

Invariant: text that other peers chose reaches the terminal without control characters and is never read as markup.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from shoal.node.happenings import Happening, HappeningKind, Severity
from shoal.node.reachability import ReachState
from shoal.node.status import (
    LineStatus,
    Measured,
    PeerStatus,
    Status,
    TrainingStatus,
    Verdict,
    clean_text,
    judge_health,
    judge_readiness,
)
from shoal.node.training.loss_units import write_loss
from shoal.protocol.effects import Phase

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

REFRESHES_PER_S = 4
WATCH_PERIOD_S = 1.0
HAPPENINGS_SHOWN_MAX = 8
REASON_CHARS_MAX = 1200  # the trainer's last words say what to do at their end
CURVE_WIDTH = 48
RELAY_WITHHELD = "a capped peer relays no tensors for others"
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {Severity.INFO: "", Severity.WARNING: "yellow", Severity.ERROR: "red"}
_FAILURE_TITLES = {
    HappeningKind.ATTEMPT_FAILED: "failed attempt",
    HappeningKind.PART_REASSIGNED: "part moved",
    HappeningKind.SENDER_MISSING: "part left out",
}
_PHASES = (Phase.GATHER, Phase.EXCHANGE, Phase.COMMIT, Phase.FETCH, Phase.APPLY)


class PeerMark(StrEnum):
    """What the demo did to a peer, and how that peer is."""

    ALIVE = "alive"
    JOINED = "joined"
    KILLED = "killed"
    CATCHING_UP = "catching up"
    LEFT = "left"


_MARKS = {
    PeerMark.ALIVE: ("●", "green"),
    PeerMark.JOINED: ("+", "cyan"),
    PeerMark.KILLED: ("✕", "red"),
    PeerMark.CATCHING_UP: ("↻", "yellow"),
    PeerMark.LEFT: ("-", "dim"),
}
_GONE = (PeerMark.KILLED, PeerMark.LEFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPeer:
    """One peer of the demo. `state_root` is hexadecimal, empty before it has one."""

    name: str
    mark: PeerMark
    phase: str
    round: int
    loss: float | None
    tokens_per_s: float
    state_root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoView:
    """One moment of the demo. `rounds_planned` is 0 where it runs until it is stopped; the losses are one a round."""

    elapsed_s: float
    round: int
    rounds_planned: int
    losses: tuple[float, ...]
    tokens_per_s: float
    contribution_bytes: int
    fp32_bytes: int
    peers: tuple[DemoPeer, ...]
    happenings: tuple[Happening, ...]


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.0f} {units[power]}" if power == 0 or abs(count) >= 99.95 else f"{count:.1f} {units[power]}"


def format_count(count: float) -> str:
    """Three digits and a factor: 18.4k, 5.2M."""
    units = ("", "k", "M", "G", "T")
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.0f}{units[power]}" if power == 0 or abs(count) >= 99.95 else f"{count:.1f}{units[power]}"


def format_span(seconds: float) -> str:
    """A span of time in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_loss(loss: float | None) -> str:
    return "–" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def format_mbit(mbit: float) -> str:
    """A rate on the line, as it is measured."""
    return f"{mbit:.0f} Mbit/s" if mbit >= 99.95 else f"{mbit:.1f} Mbit/s"


def describe_line(line: LineStatus) -> str:
    """The caps in force, until when, and what tensors take."""
    up, down = (
        f"{name} cap {'none' if mbit is None else f'{mbit:.10g} Mbit/s'}"
        for name, mbit in (("upload", line.upload_cap_mbit), ("download", line.download_cap_mbit))
    )
    until = f", until {clean_text(line.caps_until)}" if line.caps_until else ""
    if line.sent_mbit is None or line.received_mbit is None:
        return f"{up}, {down}{until}; tensors not measured yet"
    rates = f"{format_mbit(line.sent_mbit)} up and {format_mbit(line.received_mbit)} down"
    return f"{up}, {down}{until}; tensors {rates} in the last minute"


def draw_curve(losses: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A line of bars, `width` at most: each the mean of as many rounds, the lowest loss the lowest bar."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    edges = [index * len(finite) // columns for index in range(columns + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / spread * len(_BARS)))] for mean in means)


def describe_status(status: Status) -> list[str]:
    """The status in plain lines, for pipes and logs."""
    now, training, traffic = status.round, status.training, status.traffic
    lines = [
        f"{clean_text(status.swarm_name)}: round {now.round}, attempt {now.attempt + 1},"
        f" {now.phase} for {format_span(now.phase_s)}{_limit(status)}{_waiting(status)}",
        f"peer {status.peer} {clean_text(status.name)}".rstrip(),
        f"{status.role}, up {format_span(status.uptime_s)}",
        f"{_plural(status.rounds_certified, 'round')} certified since its start,"
        f" loss {format_loss(training.loss_last)}{_held_out(training)},"
        f" {format_count(training.tokens_per_s)} tokens/s, trainer {training.state} on {clean_text(training.device)}"
        f"{_mixed(training)}",
        f"{_count_peers(status.peers)}; {now.voters_live} of {now.voters} voters live, {now.votes_needed} needed",
        f"sent {format_bytes(traffic.tensor_sent_bytes + traffic.control_sent_bytes)},"
        f" received {format_bytes(traffic.tensor_received_bytes + traffic.control_received_bytes)};"
        f" contributions {_compression(traffic.contribution_bytes, traffic.fp32_bytes)}",
        describe_line(status.line),
        *([RELAY_WITHHELD] if status.line.relay_withheld else []),
        f"state root {now.state_root[:16] or 'none'}",
        f"others join with: shoal join '{clean_text(status.uri, len(status.uri))}'",
        *(f"swarm's {describe_measured(one, training.loss_unit)}" for one in status.measured[:1]),
    ]
    for title, verdict in (("unhealthy", judge_health(status)), ("not ready", judge_readiness(status))):
        lines += [f"{title}: {clean_text(reason, REASON_CHARS_MAX)}" for reason in verdict.reasons]
    lines += [f"warning: {clean_text(warning, REASON_CHARS_MAX)}" for warning in status.warnings]
    return [*lines, *(f"{title}: {text}" for title, text in _failure_rows(status))]


def _held_out(training: TrainingStatus) -> str:
    """What this peer has last measured of a base; empty where it has not yet."""
    found = training.held_out
    if found is None:
        return ""
    perplexity = "" if found.perplexity is None else f", perplexity {found.perplexity:.4g}"
    return (
        f", held-out loss of round {found.round} {write_loss(format_loss(found.loss), training.loss_unit)}{perplexity}"
    )


def _mixed(training: TrainingStatus) -> str:
    """What it has done without a quorum; empty where there was one."""
    return f", mixed in {_plural(training.pairs_mixed, 'pair')} without a quorum" if training.pairs_mixed else ""


def describe_measured(one: Measured, unit: str) -> str:
    """What a member has measured, and which one; losses are in `unit`."""
    perplexity = "" if one.perplexity is None else f", perplexity {one.perplexity:.4g}"
    author = clean_text(one.name) or one.peer[-8:]
    figure = f"held-out loss of round {one.round} {write_loss(format_loss(one.loss), unit)}{perplexity}"
    return f"{figure}, measured by {author} over {_plural(one.tokens, 'token')}"


def render_status(status: Status) -> "RenderableType":
    """The status for a terminal of any width."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    health, readiness = judge_health(status), judge_readiness(status)
    title = Text.assemble((clean_text(status.swarm_name), "bold"), "  ", _verdict_text(health, readiness))
    notices: list[RenderableType] = [
        Text(f"! {clean_text(reason, REASON_CHARS_MAX)}", "red") for reason in health.reasons
    ]
    notices += [Text(f"! {clean_text(one)}", "yellow") for one in readiness.reasons if one not in health.reasons]
    notices += [Text(f"! {clean_text(warning, REASON_CHARS_MAX)}", "yellow") for warning in status.warnings]
    happened = _happening_lines(status.happenings)
    return Group(
        title,
        *notices,
        _phase_line(status),
        _figures(status),
        Rule("peers", style="dim"),
        _peer_table(status.peers),
        *([Rule("what happened", style="dim"), *happened] if happened else []),
    )


def render_demo(view: DemoView) -> "RenderableType":
    """One frame of the demo."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    planned = f" of {view.rounds_planned}" if view.rounds_planned else ""
    head = Text.assemble(
        (f"round {view.round}{planned}", "bold"),
        f"   {format_span(view.elapsed_s)}   {format_count(view.tokens_per_s)} tokens/s   ",
        f"contributions {_compression(view.contribution_bytes, view.fp32_bytes)}",
    )
    ends = f"{format_loss(view.losses[0])} → {format_loss(view.losses[-1])}" if view.losses else "after the first round"
    loss = Text.assemble("loss  ", (draw_curve(view.losses), "cyan"), f"  {ends}")
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for column in ("", "peer", "", "phase"):
        table.add_column(column)
    for column in ("round", "loss", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("state root")
    for peer in view.peers:
        sign, style = _MARKS[peer.mark]
        gone = peer.mark in _GONE
        figures = ("–", "–") if gone else (format_loss(peer.loss), format_count(peer.tokens_per_s))
        table.add_row(
            Text(sign, style),
            Text(clean_text(peer.name)),
            Text(peer.mark, style),
            Text("" if gone else clean_text(peer.phase)),
            str(peer.round),
            *figures,
            Text(peer.state_root[:12], "dim"),
        )
    happened = _happening_lines(view.happenings)
    return Group(head, loss, Text(), table, *([Rule("what happened", style="dim"), *happened] if happened else []))


def describe_demo(view: DemoView) -> str:
    """One line of the demo, for pipes and logs."""
    alive = sum(peer.mark not in _GONE for peer in view.peers)
    last = view.losses[-1] if view.losses else None
    return (
        f"[{view.elapsed_s:6.1f} s] round {view.round}, loss {format_loss(last)}, {alive} of {len(view.peers)} peers,"
        f" {format_count(view.tokens_per_s)} tokens/s,"
        f" contributions {_compression(view.contribution_bytes, view.fp32_bytes)}"
    )


def print_table(columns: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> None:
    """Rows of cells, each with a style: a table on a terminal, elsewhere a line, and one for each further cell."""
    if not sys.stdout.isatty():
        for (verdict, name, text, *more), _ in rows:
            print("\n    -> ".join([f"{verdict:<12}{name:<15}{text}", *(cell for cell in more if cell)]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for column in columns:
        table.add_column(column)
    for cells, style in rows:
        table.add_row(*(Text(clean_text(cell, 500), style if place < 2 else "") for place, cell in enumerate(cells)))
    Console().print(table)


def print_status(status: Status) -> None:
    """The status once: a table on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(render_status(status))
    else:
        print("\n".join(describe_status(status)))


def print_summary(summary: Mapping[str, Any], problems: Sequence[str]) -> None:
    """The demo's report, for people."""
    roots = {root[:16] for root in summary["final_roots"].values()}
    counts = ", ".join(f"{name} {count}" for name, count in summary["contributions"].items())
    aborted = ", ".join(f"{reason} {count}" for reason, count in summary["rounds_aborted"].items()) or "none"
    ratio = _compression(summary["bytes_encoded"], summary["bytes_fp32"])
    print()
    print(f"time              {format_span(summary['seconds'])}")
    print(f"held-out loss     {summary['loss_first']:.3f} -> {summary['loss_last']:.3f} nats per byte")
    print(f"rounds certified  {summary['rounds_certified']}; failed attempts: {aborted}")
    print(f"took part in      {counts}")
    print(f"killed, joined    {', '.join(summary['peers_killed'])}; {', '.join(summary['peers_joined'])}")
    agreed = f"equal: {roots.pop()}" if len(roots) == 1 else f"DIFFERENT: {', '.join(sorted(roots))}"
    where = f"{len(summary['final_roots'])} survivors at round {summary['state_root_round']}"
    print(f"state roots       {where}, {agreed}")
    print(f"bytes sent        {format_bytes(summary['bytes_sent'])}; parts {ratio}")
    print(f"model             {summary['export']}")
    print(f"loss curve        {summary['plot'] or 'not drawn: matplotlib is missing (the extra `plot`)'}")
    print("\nsample of its text:")
    for line in clean_lines(summary["sample"]):
        print(f"    {line}")
    for problem in problems:
        print(f"PROBLEM: {problem}")


def clean_lines(text: str) -> list[str]:
    """Generated text, line by line, without control characters."""
    return [clean_text(line, 160) for line in text.splitlines()]


def watch_status(fetch: Callable[[], Status], wait: Callable[[float], None] = time.sleep) -> NoReturn:
    """The status again and again, until `fetch` raises or the person interrupts; on a terminal, in place."""
    if not sys.stdout.isatty():
        while True:
            print("\n".join([*describe_status(fetch()), ""]), flush=True)
            wait(WATCH_PERIOD_S)
    with show_live() as show:
        while True:
            show(render_status(fetch()))
            wait(WATCH_PERIOD_S)


@contextmanager
def show_live() -> "Iterator[Callable[[RenderableType], None]]":
    """A place on the terminal that each call draws anew; what was drawn last stays there afterwards."""
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda renderable: live.update(renderable, refresh=True)


class DemoScreen:
    """The demo's output: drawn in place on a terminal; elsewhere a line for every round and every happening."""

    def __init__(self, show: "Callable[[RenderableType], None] | None") -> None:
        self._show = show
        self._round = -1
        self._told: tuple[Happening, ...] = ()

    def show(self, view: DemoView) -> None:
        """The newest moment. Cheap enough for REFRESHES_PER_S calls a second."""
        if self._show is not None:
            self._show(render_demo(view))
            return
        for happening in view.happenings:
            if happening not in self._told:
                print(f"[{view.elapsed_s:6.1f} s] {clean_text(happening.text)}", flush=True)
        self._told = view.happenings
        if view.round != self._round:
            print(describe_demo(view), flush=True)
            self._round = view.round


@contextmanager
def open_demo_screen() -> Iterator[DemoScreen]:
    """The demo's output until the context ends."""
    if not sys.stdout.isatty():
        yield DemoScreen(None)
        return
    with show_live() as show:
        yield DemoScreen(show)


def _waiting(status: Status) -> str:
    names = [clean_text(one.name) or one.peer[-8:] for one in status.round.waiting_for]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f", waiting for {shown}" if names else ""


def _limit(status: Status) -> str:
    now = status.round
    if now.deadline_s is None:
        return ""
    name = f" ({now.deadline})" if now.deadline else ""
    return f", at most {format_span(max(0.0, now.deadline_s))} left{clean_text(name)}"


def _failure_rows(status: Status) -> list[tuple[str, str]]:
    """What failed last, of each kind: where, why, by whom, since when, and what was done about it."""
    rows = []
    for one in status.failures:
        who = f" ({clean_text(one.peer)})" if one.peer else ""
        where = f"attempt {one.attempt + 1} of round {one.round}"
        text = f"{one.reason}{who} in {where}, {format_span(one.age_s)} ago; {one.remedy}"
        rows.append((_FAILURE_TITLES[one.kind], clean_text(text, 400)))
    return rows


def _count_peers(peers: Iterable[PeerStatus]) -> str:
    rows = list(peers)
    live = sum(row.alive for row in rows)
    ready = sum(row.ready for row in rows)
    return f"{_plural(live, 'peer')} live, {ready} ready, {sum(row.participating for row in rows)} in this round"


def _plural(count: int, one: str) -> str:
    return f"{count} {one}{'' if count == 1 else 's'}"


def _compression(encoded_bytes: int, fp32_bytes: int) -> str:
    if not encoded_bytes:
        return "none yet"
    ratio = fp32_bytes / encoded_bytes
    return f"{format_bytes(encoded_bytes)}, {ratio:.1f} times less than fp32"


def _verdict_text(health: Verdict, readiness: Verdict) -> "Text":
    from rich.text import Text

    if not health.ok:
        return Text("unhealthy", "bold red")
    return Text("ready", "green") if readiness.ok else Text("not ready", "yellow")


def _phase_line(status: Status) -> "Text":
    from rich.text import Text

    now, training = status.round, status.training
    line = Text.assemble((f"round {now.round}", "bold"), "  ")
    if now.phase not in _PHASES:
        line.append(f"{now.phase} ", "reverse")
    for phase in _PHASES:
        line.append(f" {phase} ", "reverse" if phase == now.phase else "dim")
    if now.attempt:
        line.append(f"  attempt {now.attempt + 1}", "yellow")
    if now.phase == Phase.GATHER and training.steps_planned:
        line.append(f"  step {training.steps} of {training.steps_planned}")
    elif now.progress is not None:
        line.append(f"  {now.progress:.0%}")
    line.append(f", for {format_span(now.phase_s)}")
    line.append(_limit(status))
    line.append(_waiting(status))
    if status.catch_up.active:
        line.append(f", catching up: {clean_text(status.catch_up.detail)}", "yellow")
    return line


def _figures(status: Status) -> "Table":
    from rich.table import Table
    from rich.text import Text

    training, traffic, disk = status.training, status.traffic, status.disk
    losses = [point.loss for point in training.loss_history]
    trainer = (
        f"{training.state} on {clean_text(training.device) or 'no device'}, {_plural(training.restarts, 'restart')}"
    )
    if training.steps_dropped:
        trainer += f", {_plural(training.steps_dropped, 'step')} dropped"
    trainer += _mixed(training)
    sent = format_bytes(traffic.tensor_sent_bytes + traffic.control_sent_bytes)
    received = format_bytes(traffic.tensor_received_bytes + traffic.control_received_bytes)
    aborted = ", ".join(f"{one.count} {one.reason}" for one in status.aborted) or "none"
    told = ", ".join(describe_measured(one, training.loss_unit) for one in status.measured[:1])
    rows = [
        ("loss", f"{format_loss(training.loss_first)} → {format_loss(training.loss_last)}  {draw_curve(losses)}"),
        ("held out", _held_out(training).removeprefix(", ") or "not measured here yet"),
        ("in the swarm", told or "nobody has measured yet"),
        ("trainer", trainer),
        ("speed", f"{format_count(training.tokens_per_s)} tokens/s, {format_count(training.tokens)} tokens trained"),
        ("rounds", f"{status.rounds_certified} certified since its start; aborted attempts: {aborted}"),
        ("peers", f"{_count_peers(status.peers)}; {status.round.voters_live} of {status.round.voters} voters live"),
        ("traffic", f"{sent} sent, {received} received"),
        ("line", describe_line(status.line)),
        ("reachable", f"{status.reach.state} ({status.reach.reason}){_addresses(status)}"),
        ("control port", _describe_control(status)),
        ("tensor relay", _describe_tensor_relay(status)),
        ("router", clean_text(status.router.detail)),
        ("contributions", _compression(traffic.contribution_bytes, traffic.fp32_bytes)),
        (
            "disk",
            f"{format_bytes(disk.blob_bytes)} used, {format_bytes(disk.free_bytes)} free, rounds from"
            f" {disk.oldest_round} on{_vectors(disk.vector_bytes)}",
        ),
        ("state root", status.round.state_root[:16] or "none"),
        ("join", clean_text(status.uri, len(status.uri))),
    ]
    rows[5:5] = _failure_rows(status)
    table = Table.grid(padding=(0, 2))
    for title, text in rows:
        table.add_row(Text(title, "dim"), Text(text, overflow="fold"))
    return table


def _vectors(nbytes: int) -> str:
    return f"; the model's vectors lie there, too: {format_bytes(nbytes)}" if nbytes else ""


def _describe_control(status: Status) -> str:
    control = status.control
    parts = [str(control.state)]
    if control.relays:
        parts.append(f"reached through {len(control.relays)} relays")
    if control.relaying:
        parts.append(f"relays {control.circuits} connections for {control.reservations} peers")
    return ", ".join(parts)


def _describe_tensor_relay(status: Status) -> str:
    relay = status.tensor_relay
    parts = [f"passes on {_plural(relay.links, 'link')}" if relay.active or relay.links else "passes on nothing"]
    if status.line.relay_withheld:
        parts.append(RELAY_WITHHELD)
    if relay.active:
        parts.append(f"{format_bytes(relay.budget_bytes)} left within the hour")
    if relay.relayed_bytes:
        parts.append(f"{format_bytes(relay.relayed_bytes)} so far")
    parts += [f"refused {one.count} {one.reason}" for one in relay.refusals]
    parts += [f"ended {one.count} {one.reason}" for one in relay.ends]
    return ", ".join(parts)


def _addresses(status: Status) -> str:
    found = [one.address for one in status.reach.addresses if one.state is ReachState.REACHABLE]
    return f" at {', '.join(found)}" if found else ""


def _peer_table(peers: Iterable[PeerStatus]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("peer", no_wrap=True)
    # The narrower the terminal, the more lines a state takes: nothing else of a row may be broken or lost.
    table.add_column("state", min_width=9)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("address", min_width=12, overflow="fold")
    for row in peers:
        name = Text(clean_text(row.name, 32), "bold" if row.me else "")
        name.append(f"{' ' if row.name else ''}{row.peer[-8:]}{' (this)' if row.me else ''}", "dim")
        state = "in round" if row.participating else "ready" if row.ready else "trains on"
        words = [state] + ["votes"] * row.voter + ["owns parts"] * row.owner
        table.add_row(
            name,
            Text(", ".join(words), "green" if row.participating else "") if row.alive else Text("gone", "red"),
            format_count(row.tokens_per_s) if row.alive else "–",
            str(row.head_round),
            Text(" ".join(filter(None, (clean_text(row.address), row.path))), "dim"),
        )
    return table


def _happening_lines(happenings: Sequence[Happening]) -> "list[RenderableType]":
    from rich.text import Text

    return [
        Text.assemble(
            (time.strftime("%H:%M:%S  ", time.localtime(one.at_s)), "dim"),
            (clean_text(one.text), _STYLES[one.severity]),
        )
        for one in happenings[-HAPPENINGS_SHOWN_MAX:]
    ]
