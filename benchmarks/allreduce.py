"""Rounds beside what others offer for the same: gloo's all-reduce and hivemind's averager, in one run.

    python -m benchmarks.allreduce [--peers 2,4] [--mib 16,64] [--codecs int8,fp32,int4] [--rounds 5] [--folder DIR]
                                   [--no-hivemind] [--json FILE]

All peers are processes on this machine, on loopback. Ours are whole certified rounds, as `shoal bench allreduce` has
them; gloo's are float32, without encryption, from the call to the last process's return; hivemind's are steps of its
averager with 8 bits a value over its own TLS, matchmaking included, from the call to the last peer's return, in a venv
that is made for it under build/bench (with numpy 2.3.5: with a newer one its 8-bit codecs fail). What cannot be had is
left out with the reason. The systems take turns, case by case.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hivemind_venv import run_in_hivemind
from shoal.node.bench.allreduce import MIB, AllreduceOptions, run_allreduce
from shoal.node.bench.commands import describe_machine, format_table

WARMUPS = 2


def run_gloo_process(rank: int, peers: int, elements: int, rounds: int, folder: str, answers: Any) -> None:
    """One rank: the times at which each call began and returned."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=peers)
    values = torch.randn(elements)
    spans = []
    for _ in range(WARMUPS + rounds):
        dist.barrier()
        began_s = time.monotonic()
        dist.all_reduce(values)
        spans.append((began_s, time.monotonic()))
        values /= peers
    dist.barrier()
    dist.destroy_process_group()
    answers.put(spans[WARMUPS:])


def run_gloo(peers: int, elements: int, rounds: int) -> list[float]:
    """Seconds a step, from the last call to the last return."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_gloo_process, args=(rank, peers, elements, rounds, folder, answers))
            for rank in range(peers)
        ]
        for process in processes:
            process.start()
        spans = [answers.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
    return [max(end for _, end in step) - max(began for began, _ in step) for step in zip(*spans, strict=True)]


def run_hivemind(peers: int, elements: int, rounds: int) -> list[float]:
    """Seconds a step; raises OSError and SubprocessError."""
    steps: list[float] = run_in_hivemind("allreduce_hivemind.py", peers, elements, WARMUPS + rounds)["steps_s"]
    return steps[WARMUPS:]


def measure_case(peers: int, mib: float, options: argparse.Namespace) -> dict[str, Any]:
    """Every system's figures for one number of peers and one size, or why there are none."""
    case: dict[str, Any] = {}
    for codec in options.codecs:
        wanted = AllreduceOptions(peers=peers, mib=mib, codec=codec, rounds=options.rounds, folder=options.folder)
        case[codec] = run_allreduce(wanted, lambda text: None).to_json()
    elements = int(mib * MIB / 4)
    case["gloo fp32"] = run_gloo(peers, elements, options.rounds)
    if options.hivemind:
        try:
            case["hivemind 8 bits"] = run_hivemind(peers, elements, options.rounds)
        except (OSError, subprocess.SubprocessError) as error:
            case["hivemind 8 bits"] = f"not measured: {error}"
    return case


def describe_case(peers: int, mib: float, case: dict[str, Any]) -> list[list[str]]:
    """Rows of the table."""
    rows = []
    gloo_s = statistics.median(case["gloo fp32"])
    for name, figures in case.items():
        head = [f"{peers} peers, {mib:g} MiB", name]
        if isinstance(figures, str):
            rows.append([*head, figures, "", "", "", "", ""])
        elif isinstance(figures, list):
            step_s = statistics.median(figures)
            rows.append([*head, f"{step_s:.3f}", "", f"{step_s / gloo_s:.1f}", "", "", ""])
        else:
            median = figures["median"]
            rows.append(
                [
                    *head,
                    f"{median['step_s']:.3f}",
                    f"{median['exchange_s']:.3f}",
                    f"{median['step_s'] / gloo_s:.1f}",
                    f"{median['cpu_s']:.2f}",
                    f"{figures['peak_rss_mib']:.0f}",
                    f"{figures['lag_p99_ms']:.0f}",
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="rounds beside gloo's all-reduce and hivemind's averager")
    parser.add_argument("--peers", type=lambda text: [int(one) for one in text.split(",")], default=[2, 4])
    parser.add_argument("--mib", type=lambda text: [float(one) for one in text.split(",")], default=[16.0, 64.0])
    parser.add_argument("--codecs", type=lambda text: text.split(","), default=["int8", "fp32", "int4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where our peers' files lie")
    parser.add_argument("--no-hivemind", dest="hivemind", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases: dict[str, Any] = {}
    rows: list[list[str]] = []
    columns = ("", "", "step, s", "of it exchange", "times gloo", "CPU, s", "MiB a peer", "loop p99, ms")
    for peers in options.peers:
        for mib in options.mib:
            cases[f"{peers} peers, {mib:g} MiB"] = case = measure_case(peers, mib, options)
            rows += describe_case(peers, mib, case)
            print("\n".join(format_table(columns, rows, "<<>>>>>>")), flush=True)
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), "cases": cases}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
