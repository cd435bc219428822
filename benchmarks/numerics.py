"""What the numbers of a round cost one core: every codec, aggregation, outer step, digests.

    python -m benchmarks.numerics [--elements N] [--repeats N] [--json FILE]

GB (10^9 bytes) of float32 a second of this thread's CPU time, which a busy machine disturbs less than the wall clock.
Each figure is the median of its repeats, after one that is not counted. Aggregating includes
checking every part and encoding the result. "First use" is in processes of their own, by the wall clock.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from shoal.node.bench.allreduce import AllreduceOptions, make_bench_manifest
from shoal.node.bench.codecs import find_error, measure_codecs
from shoal.node.bench.rates import measure_rate, measure_span
from shoal.node.payload_memory import PayloadMemory
from shoal.protocol.aggregators import AGGREGATORS, Aggregator, Reduction, WeightedPart
from shoal.protocol.codecs import CODECS, INT8, Codec, take_fresh
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.identity import PeerId
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterRates
from shoal.protocol.state import chunk_digests

MEMBERS = 8
PART_ELEMENTS = 1 << 19  # what a swarm with a model of 64 MiB has
FREEZE_MIB = 64.0


def run(elements: int, repeats: int) -> dict[str, float]:
    """Every figure by its name."""
    optimizer, rates = OUTER_OPTIMIZERS["nesterov"], OuterRates(learning_rate=0.7, momentum=0.9)
    entropy = np.random.default_rng(1)
    values, momentum, update = (entropy.standard_normal(elements, dtype=np.float32) for _ in range(3))
    parts = draw_parts(entropy, elements)

    def rate(work: Callable[[], object], nbytes: int) -> float:
        return round(measure_rate(work, nbytes, repeats, time.thread_time), 1)

    return {
        **{
            f"{name} of {MEMBERS} members, their input": rate(
                partial(make_reduction(aggregator).reduce_part, parts, elements), MEMBERS * values.nbytes
            )
            for name, aggregator in AGGREGATORS.items()
        },
        "outer step (Nesterov)": rate(lambda: optimizer.apply(values, momentum, update, rates), values.nbytes),
        "chunk digests": rate(lambda: chunk_digests(values), values.nbytes),
    }


def draw_parts(entropy: np.random.Generator, elements: int) -> list[WeightedPart]:
    """One of every member, normal values in int8."""
    drawn = [INT8.encode(entropy.standard_normal(elements, dtype=np.float32)) for _ in range(MEMBERS)]
    return [WeightedPart(encoded=one, weight=1.0, clip_factor=1.0) for one in drawn]


def measure_parts(repeats: int) -> dict[str, float]:
    """Microseconds of one core for a part of PART_ELEMENTS in int8: looking whether it decodes, and its mean of few."""
    parts = draw_parts(np.random.default_rng(4), PART_ELEMENTS)
    reduce_part = make_reduction(AGGREGATORS["mean"]).reduce_part
    works: dict[str, Callable[[], object]] = {
        "check": partial(INT8.check_untrusted, parts[0].encoded, PART_ELEMENTS),
        **{f"mean of {count}": partial(reduce_part, parts[:count], PART_ELEMENTS) for count in (2, 4, MEMBERS)},
    }
    return {f"{name}, us": round(1e6 * measure_span(work, repeats, time.thread_time)) for name, work in works.items()}


def measure_freezing(repeats: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds for freezing a contribution of 64 MiB, and how many of them the kernel took: with fresh memory
    for every round, and with memory that is used again."""
    figures: dict[str, dict[str, float]] = {}
    for name, take in (("fresh memory", take_fresh), ("memory used again", PayloadMemory().take)):
        manifest = make_bench_manifest(AllreduceOptions(mib=FREEZE_MIB), (PeerId(bytes(32)),) * 2)
        contributor = Contributor(manifest, take=take)
        entropy = np.random.default_rng(3)
        base, local = (entropy.standard_normal(manifest.layout.elements, np.float32) for _ in range(2))
        spans = []
        held: deque[Frozen] = deque(maxlen=2)  # the last round's is still sent
        for number in range(repeats + 1):
            before = resource.getrusage(resource.RUSAGE_THREAD)
            held.append(contributor.freeze(number, base, local))
            after = resource.getrusage(resource.RUSAGE_THREAD)
            kernel_s = after.ru_stime - before.ru_stime
            spans.append((after.ru_utime - before.ru_utime + kernel_s, kernel_s))
        cpu_s, kernel_s = (statistics.median(column) for column in zip(*spans[1:], strict=True))
        figures[name] = {"CPU, ms": round(1e3 * cpu_s, 1), "of it kernel, ms": round(1e3 * kernel_s, 1)}
    return figures


LOADING = """
import json, time, psutil
from shoal.node.bench.allreduce import AllreduceOptions, make_bench_manifest
from shoal.node.bench.codecs import find_error, measure_codecs
from shoal.node.bench.rates import measure_rate
from shoal.node.payload_memory import PayloadMemory
from shoal.protocol.aggregators import AGGREGATORS, Reduction, WeightedPart
from shoal.protocol.codecs import INT8, encode_with_feedback
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterRates
import numpy as np
before, began_s = psutil.Process().memory_info().rss, time.perf_counter()
zeros = np.zeros(257, np.float32)
encoded = encode_with_feedback(INT8, zeros, zeros, zeros.copy())
reduction = Reduction(codec_in=INT8, aggregator=AGGREGATORS["mean"], codec_out=INT8)
INT8.decode_untrusted(reduction.reduce_part([WeightedPart(encoded=encoded, weight=1.0)], 257), 257, zeros)
OUTER_OPTIMIZERS["nesterov"].apply(zeros.copy(), zeros.copy(), zeros, OuterRates(learning_rate=0.7, momentum=0.9))
print(json.dumps([(psutil.Process().memory_info().rss - before) / 2**20, time.perf_counter() - began_s]))
"""


def measure_loading() -> dict[str, float]:
    """What the first round's functions take in a fresh process: where nothing is kept yet, and then where they are."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for when in ("compiled anew", "kept"):
            ended = subprocess.run(
                [sys.executable, "-c", LOADING],
                env={**os.environ, "NUMBA_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            mib, seconds = json.loads(ended.stdout)
            figures |= {f"{when}, MiB": round(mib, 1), f"{when}, s": round(seconds, 2)}
    return figures


def make_reduction(aggregator: Aggregator) -> Reduction:
    """From int8 to int8."""
    return Reduction(codec_in=INT8, aggregator=aggregator, codec_out=INT8)


def find_heavy_error(codec: Codec, elements: int) -> float:
    """What is lost of Student's t with 3 degrees of freedom, as a share of its root mean square."""
    values = np.random.default_rng(2).standard_t(3, elements).astype(np.float32)
    out = np.empty_like(values)
    codec.decode_untrusted(codec.encode(values), elements, out)
    return find_error(values, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="what the numbers of a round cost one core")
    parser.add_argument("--elements", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    codecs = {
        rates.codec: {**asdict(rates), "error_of_heavy_tails": find_heavy_error(CODECS[rates.codec], options.elements)}
        for rates in measure_codecs(options.elements, options.repeats, lambda name: None)
    }
    figures = {
        "codecs": codecs,
        **run(options.elements, options.repeats),
        "a part": measure_parts(options.repeats),
        "freezing": measure_freezing(options.repeats),
        "first use": measure_loading(),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
