"""`shoal bench allreduce|codecs|links|disk`: measure, show a table, and write the figures as JSON where asked to."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from shoal.node.config import IN_MEMORY, ON_DISK
from shoal.node.process import count_cores
from shoal.protocol.aggregators import AGGREGATORS
from shoal.protocol.codecs import CODECS
from shoal.protocol.errors import ConfigError

REPEATS = 5

Say = Callable[[str], None]


def add_bench_parsers(bench: argparse.ArgumentParser) -> None:
    """The sub-commands of `shoal bench`."""
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    allreduce = commands.add_parser("allreduce", help="whole rounds between local peers, without training")
    allreduce.add_argument("--peers", type=int, default=4, help="processes on this machine (default: 4)")
    allreduce.add_argument("--mib", type=float, default=64.0, help="MiB of float32 values of each (default: 64)")
    allreduce.add_argument("--codec", default="int8", help=f"one of {', '.join(CODECS)} (default: int8)")
    allreduce.add_argument("--update-codec", help="that of the update; default: the same")
    allreduce.add_argument("--aggregator", default="mean", help=f"one of {', '.join(AGGREGATORS)} (default: mean)")
    allreduce.add_argument("--rounds", type=int, default=REPEATS, help=f"that are measured (default: {REPEATS})")
    allreduce.add_argument("--part-elements", type=int, help="as in the manifest; default: as a swarm would have it")
    allreduce.add_argument("--folder", type=Path, help="where the peers' files lie; default: the system's for such")
    allreduce.add_argument("--vectors", default=IN_MEMORY, help=f"{IN_MEMORY} or {ON_DISK}, as store.vectors")
    codecs = commands.add_parser("codecs", help="speed, size and error of every codec, on one core")
    links = commands.add_parser("links", help="tensor links between two processes on this machine")
    links.add_argument("--megabytes", type=int, default=1000, help="in each run (default: 1000)")
    disk = commands.add_parser("disk", help="what a round asks of the disk")
    disk.add_argument("--data-dir", type=Path, help="the folder whose disk is measured; default as for `up`")
    for command in (codecs, links, disk):
        command.add_argument("--repeats", type=int, default=REPEATS, help=f"of every figure (default: {REPEATS})")
    for command in (allreduce, codecs, links, disk):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def run_bench(options: argparse.Namespace, data_dir: Path, tell: Say) -> int:
    """Measure what was asked for, and tell it line by line. Raises ConfigError and BenchFailed."""
    from shoal.node.progress import show_progress

    if options.bench_command != "allreduce" and not 1 <= options.repeats <= 1000:
        raise ConfigError("--repeats", f"is {options.repeats}", "use 1 to 1000")
    if options.bench_command == "links" and not 1 <= options.megabytes <= 1_000_000:
        raise ConfigError("--megabytes", f"is {options.megabytes}", "use 1 to 1000000")
    with ExitStack() as stack:
        out = None if options.json is None else stack.enter_context(_open_json(options.json))
        say = stack.enter_context(show_progress("measuring"))
        figures, lines = BENCHES[options.bench_command](options, data_dir, say)
        if out is not None:
            out.truncate(0)
            out.write(json.dumps({**describe_machine(), **figures}, indent=2, default=str) + "\n")
    for line in lines:
        tell(line)
    return 0


def _open_json(path: Path) -> TextIO:
    """Before anything is measured: minutes later would be too late to find out. What it holds stays until then."""
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
        raise ConfigError("--json", problem, "give a file in a folder that is there and writable") from error


def describe_machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        "shoal": version("shoal"),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": count_cores(),
        "processor": _read_processor(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """Aligned columns. `align` has a < or a > for each; without it the first is to the left and all others right."""
    align = align or "<" + ">" * (len(columns) - 1)
    table = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(columns))]
    shapes = [f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True)]
    return ["  ".join(shape.format(cell) for shape, cell in zip(shapes, row, strict=True)).rstrip() for row in table]


def _bench_allreduce(options: argparse.Namespace, data_dir: Path, say: Say) -> tuple[dict[str, Any], list[str]]:
    from shoal.node.bench.allreduce import AllreduceOptions, run_allreduce
    from shoal.node.bench.codecs import ELEMENTS, measure_codec
    from shoal.node.bench.limit import compute_limit
    from shoal.node.bench.machine import measure_machine

    wanted = AllreduceOptions(
        peers=options.peers,
        mib=options.mib,
        codec=options.codec,
        update_codec=options.update_codec,
        aggregator=options.aggregator,
        rounds=options.rounds,
        part_elements=options.part_elements,
        folder=options.folder,
        vectors=options.vectors,
    )
    machine = measure_machine(REPEATS, say)
    codec_in, codec_out = (
        measure_codec(CODECS[name], min(ELEMENTS, wanted.elements), REPEATS)
        for name in (wanted.codec, wanted.codec_out)
    )
    limit = compute_limit(
        peers=wanted.peers,
        fp32_bytes=4 * wanted.elements,
        cores=count_cores(),
        codec_in=codec_in,
        codec_out=codec_out,
        machine=machine,
    )
    result = run_allreduce(wanted, say)
    steps, median = sorted(one.step_s for one in result.rounds), result.median
    rows = [
        ("whole round, the last peer's end", f"{median.step_s:.3f} s", f"{steps[0]:.3f} to {steps[-1]:.3f} s"),
        ("  until the plan", f"{median.prepare_s:.3f} s", "encoding, the residual made durable, readiness"),
        ("  exchange", f"{median.exchange_s:.3f} s", "contributions, reduction, results"),
        ("  votes", f"{median.commit_s:.3f} s", "the update made durable"),
        ("  applied", f"{median.apply_s:.3f} s", "certificate, outer step, state root"),
        ("least time on this machine", f"{limit.wall_s:.3f} s", f"{100 * limit.wall_s / median.step_s:.0f} % reached"),
        ("  of the exchange alone", "", f"{100 * limit.wall_s / median.exchange_s:.0f} % of its time"),
        ("CPU of all peers", f"{median.cpu_s:.2f} s", f"a round; {count_cores()} cores"),
        ("memory of a peer, at most", f"{result.peak_rss_mib:.0f} MiB", describe_memory(result.peaks_mib)),
        ("event loop late, p99", f"{result.lag_p99_ms:.1f} ms", "of the worst peer"),
        ("error of the average", f"{result.rms_error:.2g}", f"rms; worst {result.worst_error:.2g}, of values of rms 1"),
    ]
    codecs = wanted.codec if wanted.update_codec is None else f"{wanted.codec} up and {wanted.update_codec} down"
    head = f"{wanted.peers} peers on this machine, {wanted.mib:g} MiB of float32 each, {codecs}, "
    head += f"parts of {wanted.make_rounds().part_elements:,}, medians of {len(steps)} certified rounds"
    return (
        {"allreduce": result.to_json(), "limit": asdict(limit), "machine": asdict(machine)},
        [head, *format_table(("", "", ""), rows, "<><")[1:]],
    )


def describe_memory(peaks_mib: Mapping[str, float]) -> str:
    """Of which kind it was in the last round, each at its highest."""
    words = {"anonymous_mib": "its own", "shared_mib": "shared", "file_mib": "mapped files"}
    found = [f"{peaks_mib[kind]:.0f} {word}" for kind, word in words.items() if kind in peaks_mib]
    return f"in the last round: {', '.join(found)}" if found else ""


def _bench_codecs(options: argparse.Namespace, data_dir: Path, say: Say) -> tuple[dict[str, Any], list[str]]:
    from shoal.node.bench.codecs import ELEMENTS, measure_codecs
    from shoal.node.bench.machine import measure_machine

    found = measure_codecs(ELEMENTS, options.repeats, say)
    machine = measure_machine(options.repeats, say)
    rows = [
        (
            one.codec,
            f"{one.bits:.3f}",
            f"{one.encode:.1f}",
            f"{one.encode_with_feedback:.1f}",
            f"{one.decode:.1f}",
            f"{one.error:.2g}",
        )
        for one in found
    ]
    columns = ("codec", "bits a value", "encode", "with error feedback", "check and decode", "error")
    lines = ["GB of float32 a second, one core; the error as a share of normal values' root mean square"]
    lines += [*format_table(columns, rows), f"memory copy {machine.memory_copy:.1f} GB/s, BLAKE3 {machine.blake3:.1f}"]
    return {"codecs": [asdict(one) for one in found], "machine": asdict(machine)}, lines


def _bench_links(options: argparse.Namespace, data_dir: Path, say: Say) -> tuple[dict[str, Any], list[str]]:
    from shoal.node.bench.links import measure_links
    from shoal.node.bench.machine import measure_machine

    found = measure_links(options.megabytes, options.repeats, say)
    machine = measure_machine(options.repeats, say)
    rows = [
        (
            f"{one.frame_bytes >> 10} KiB",
            str(one.in_flight),
            f"{one.rate:.0f}",
            f"{one.rate_min:.0f} to {one.rate_max:.0f}",
            f"{one.sender_per_cpu_s:.0f}",
            f"{one.receiver_per_cpu_s:.0f}",
        )
        for one in found.rates
    ]
    columns = ("frame", "at a time", "MB/s", "", "a CPU second of the sender", "of the receiver")
    opening = f"connection, handshake and a first blob {found.connect_ms:.1f} ms"
    beside = f"plain TCP {1000 * machine.tcp:.0f} MB/s, TLS 1.3 {1000 * machine.tls:.0f}"
    ciphers = f"AES-256-GCM {1000 * machine.aes_256_gcm:.0f}, ChaCha20-Poly1305 {1000 * machine.chacha20_poly1305:.0f}"
    lines = [
        *format_table(columns, rows),
        f"{opening}, a blob on an open link {found.fetch_ms:.2f} ms",
        f"beside it: {beside}; sealing on one core {ciphers}",
    ]
    return {"links": asdict(found), "machine": asdict(machine)}, lines


def _bench_disk(options: argparse.Namespace, data_dir: Path, say: Say) -> tuple[dict[str, Any], list[str]]:
    from shoal.node.bench.disk import measure_disk

    folder = _existing(data_dir)
    try:
        found = measure_disk(folder, options.repeats, say)
    except OSError as error:
        problem = f"{folder} cannot be written to: {error.strerror}"
        raise ConfigError("--data-dir", problem, "mend that, or give another folder") from error
    rows = [
        ("one large file, written and durable", f"{1000 * found.write:.0f} MB/s"),
        ("the same, read", f"{1000 * found.read:.0f} MB/s"),
        ("an update in 64 parts, written and durable", f"{1000 * found.blobs:.0f} MB/s"),
        ("a vote, durable", f"{found.commit_ms:.1f} ms; p99 {found.commit_p99_ms:.1f} ms"),
    ]
    return {"disk": asdict(found)}, [f"the disk of {folder}", *format_table(("", ""), rows, "<<")[1:]]


BENCHES: dict[str, Callable[[argparse.Namespace, Path, Say], tuple[dict[str, Any], list[str]]]] = {
    "allreduce": _bench_allreduce,
    "codecs": _bench_codecs,
    "links": _bench_links,
    "disk": _bench_disk,
}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: it is on the same disk, as a rule."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _read_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
