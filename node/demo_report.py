"""The demo's summary: from the survivors' disks and last statuses to a report, a plot, a model file and a text sample.

Invariant: rounds and participation come from certificates, state roots from the peers, losses from the trainers (the
curve) and from the held-out text (before and after).
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.node.config import TrainerTable
from shoal.node.export import CertifiedModel, read_certified_model, write_model
from shoal.node.ledger_store import LedgerStore
from shoal.node.status import Status
from shoal.node.terminal import print_summary
from shoal.node.trainer import SharedParameters, TrainerEvent, TrainerProcess
from shoal.node.training.messages import Evaluated, Sampled, Work
from shoal.protocol.identity import Identity, format_peer_id
from shoal.protocol.layout import initialise
from shoal.protocol.messages import Certificate
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

SAMPLE_BYTES = 240
SAMPLE_PROMPT = b"def "
ANSWER_TIMEOUT_S = 180.0
LOSS_TARGET = 2.2  # nats per byte


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecord:
    """What happened, as the demo saw it."""

    folder: Path
    text: Path | None
    statuses: dict[str, Status]
    roots: dict[str, dict[int, str]]
    survivors: tuple[str, ...]
    exit_codes: dict[str, int | None]
    killed: tuple[str, ...]
    joined: tuple[str, ...]
    losses: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What the trained model does."""

    loss_first: float
    loss_last: float
    sample: str


def finish_report(record: DemoRecord, started: float, report: Path | None) -> int:
    """Write and print the summary; 0 when the survivors agree, left with exit code 0, and the loss has fallen."""
    first = record.survivors[0]
    model = read_certified_model(record.folder / first)
    certificates = _read_certificates(record.folder / first)
    export = record.folder / "model.safetensors"
    write_model(model, export)
    outcome = asyncio.run(_try_model(model, record.text))
    plot = _draw_plot(record, outcome, certificates[-1].result.round if certificates else 0)
    common = max(set.intersection(*(set(record.roots[name]) for name in record.survivors)), default=0)
    disagreements = _find_disagreements(record)
    participation = {str(one.result.round): len(one.result.members) for one in certificates if one.result.parts}
    summary: dict[str, Any] = {
        "seconds": round(time.monotonic() - started, 1),
        "loss_first": round(outcome.loss_first, 4),
        "loss_last": round(outcome.loss_last, 4),
        "loss_by_round": {str(number): round(loss, 4) for number, loss in record.losses.items()},
        "rounds_certified": len(participation),
        "rounds_without_parts": len(certificates) - len(participation),
        "rounds_aborted": _count_aborted(record),
        "participation": participation,
        "peers_killed": list(record.killed),
        "peers_joined": list(record.joined),
        "contributions": _count_contributions(certificates, record),
        "state_roots": {name: {str(at): root for at, root in roots.items()} for name, roots in record.roots.items()},
        "state_root_round": common,
        "state_roots_differ_in": disagreements,
        "final_roots": {name: record.roots[name].get(common, "") for name in record.survivors},
        "exit_codes": record.exit_codes,
        "bytes_sent": sum(one.traffic.tensor_sent_bytes + one.traffic.control_sent_bytes for one in _all(record)),
        "bytes_encoded": sum(one.traffic.contribution_bytes for one in _all(record)),
        "bytes_fp32": sum(one.traffic.fp32_bytes for one in _all(record)),
        "export": str(export),
        "plot": str(plot) if plot else None,
        "sample": outcome.sample,
    }
    text = json.dumps(summary, indent=2)
    (record.folder / "report.json").write_text(text, encoding="utf-8")
    if report is not None:
        report.write_text(text, encoding="utf-8")
    problems = _find_problems(summary, record)
    print_summary(summary, problems)
    return 1 if problems else 0


def _all(record: DemoRecord) -> list[Status]:
    return list(record.statuses.values())


def _read_certificates(folder: Path) -> list[Certificate]:
    with LedgerStore.open(folder / "ledger.sqlite") as store:
        stored = store.list_certificates(1, 1 << 40)
    return [decode_record_untrusted(Certificate, one.body, DELTA_BYTES_MAX) for one in stored]


def _count_aborted(record: DemoRecord) -> dict[str, int]:
    """Failed attempts by reason. Every peer counts what it saw; the one that saw most of a reason is quoted."""
    aborted: Counter[str] = Counter()
    for status in _all(record):
        for one in status.aborted:
            aborted[one.reason] = max(aborted[one.reason], one.count)
    return dict(aborted)


def _count_contributions(certificates: list[Certificate], record: DemoRecord) -> dict[str, int]:
    """In how many certified rounds each peer took part."""
    names = {status.peer: name for name, status in record.statuses.items()}
    counts: Counter[str] = Counter()
    for certificate in certificates:
        for member in certificate.result.members:
            counts[names.get(format_peer_id(member.peer), "?")] += 1
    return dict(sorted(counts.items()))


def _find_disagreements(record: DemoRecord) -> list[int]:
    """Rounds at which two peers showed different state roots: there must be none."""
    seen: dict[int, set[str]] = {}
    for roots in record.roots.values():
        for number, root in roots.items():
            seen.setdefault(number, set()).add(root)
    return sorted(number for number, roots in seen.items() if len(roots) > 1)


def _find_problems(summary: dict[str, Any], record: DemoRecord) -> list[str]:
    problems = []
    if not summary["state_root_round"]:
        problems.append("the survivors were never seen at one common round")
    if summary["state_roots_differ_in"]:
        problems.append(f"state roots differ in rounds {summary['state_roots_differ_in']}")
    if summary["loss_last"] >= summary["loss_first"]:
        problems.append("the loss did not fall")
    unclean = [name for name, code in record.exit_codes.items() if code != 0 and name not in record.killed]
    if unclean:
        problems.append(f"{', '.join(unclean)} did not leave with exit code 0")
    late = [name for name in record.joined if not summary["contributions"].get(name)]
    if late:
        problems.append(f"{', '.join(late)} never contributed")
    return problems


async def _try_model(model: CertifiedModel, text: Path | None) -> _Outcome:
    """Measure the first and the last state on the held-out text, and let the last one write."""
    answers: asyncio.Queue[TrainerEvent] = asyncio.Queue()
    memory = SharedParameters(model.params.size)
    settings = TrainerTable(text=str(text.absolute()) if text else None, nice=0)
    trainer = TrainerProcess(memory, settings, answers.put_nowait)
    manifest = model.manifest
    work = Work(
        task=manifest.task,
        training=manifest.training,
        layout_digest=manifest.layout.digest,
        seed=manifest.seed,
        peer=Identity(bytes(32)).peer,
    )

    async def ask_loss() -> float:
        await trainer.evaluate()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while True:
                answer = await answers.get()
                if isinstance(answer, Evaluated):
                    return answer.loss_nats

    try:
        memory.base[:] = initialise(manifest.layout, manifest.seed)
        await trainer.start(work)
        loss_first = await ask_loss()
        memory.base[:] = model.params
        loss_last = await ask_loss()
        await trainer.sample(SAMPLE_PROMPT, SAMPLE_BYTES)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not isinstance(answer := await answers.get(), Sampled):
                pass
    finally:
        await trainer.stop()
        memory.close()
    sample = (SAMPLE_PROMPT + answer.text).decode(errors="replace")
    return _Outcome(loss_first=loss_first, loss_last=loss_last, sample=sample)


def _draw_plot(record: DemoRecord, outcome: _Outcome, last_round: int) -> Path | None:
    """The loss curve as PNG; None where matplotlib is not installed (it comes with the extra `plot`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(record.losses), list(record.losses.values()), color="#1f6f8b", label="training, at the first peer")
    held_out = [outcome.loss_first, outcome.loss_last]
    axes.plot([0, last_round], held_out, "o", color="#d1495b", label="held-out text, before and after")
    axes.axhline(LOSS_TARGET, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("round")
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("A swarm that loses one peer and gains one")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = record.folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
