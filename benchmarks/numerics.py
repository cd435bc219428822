"""What the numbers of a round cost one core: every codec, aggregation, outer step, digests.

    python -m benchmarks.numerics [--elements N] [--repeats N] [--json FILE]

GB (10^9 bytes) of float32 a second of this thread's CPU time, which a busy machine disturbs less than the wall clock.
Each figure is the median of its repeats, after one that is not counted. Aggregating includes
checking every part and encoding the result. "First use" is in processes of their own, by the wall clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from shoal.protocol.aggregators import AGGREGATORS, Aggregator, Reduction, WeightedPart
from shoal.protocol.codecs import CODECS, INT8, Codec, encode_with_feedback
from shoal.protocol.outer_step import OUTER_OPTIMIZERS
from shoal.protocol.state import chunk_digests

MEMBERS = 8
FLOAT32_BYTES = 4


def measure(work: Callable[[], object], megabytes: float, repeats: int) -> float:
    """GB a CPU second."""
    rates = []
    for _ in range(repeats + 1):
        began_s = time.thread_time()
        work()
        rates.append(megabytes / 1000 / (time.thread_time() - began_s))
    return round(statistics.median(rates[1:]), 1)


def run(elements: int, repeats: int) -> dict[str, float]:
    """Every figure by its name."""
    optimizer = OUTER_OPTIMIZERS["nesterov"]
    entropy = np.random.default_rng(1)
    values, momentum, update = (entropy.standard_normal(elements, dtype=np.float32) for _ in range(3))
    encoded = [INT8.encode(entropy.standard_normal(elements, dtype=np.float32)) for _ in range(MEMBERS)]
    parts = [WeightedPart(encoded=one, weight=1.0, clip_factor=1.0) for one in encoded]
    residual, residual_next = np.zeros_like(values), np.empty_like(values)
    megabytes = elements * FLOAT32_BYTES / 1e6
    return {
        "int8 encode with error feedback": measure(
            lambda: encode_with_feedback(INT8, values, residual, residual_next), megabytes, repeats
        ),
        **{
            f"{name} of {MEMBERS} members, their input": measure(
                partial(make_reduction(aggregator).reduce_part, parts, elements),
                MEMBERS * megabytes,
                repeats,
            )
            for name, aggregator in AGGREGATORS.items()
        },
        "outer step (Nesterov)": measure(
            lambda: optimizer.apply(values, momentum, update, 0.7, 0.9), megabytes, repeats
        ),
        "chunk digests": measure(lambda: chunk_digests(values), megabytes, repeats),
    }


LOADING = """
import json, time, psutil
from shoal.protocol.aggregators import AGGREGATORS, Reduction, WeightedPart
from shoal.protocol.codecs import INT8, encode_with_feedback
from shoal.protocol.outer_step import OUTER_OPTIMIZERS
import numpy as np
before, began_s = psutil.Process().memory_info().rss, time.perf_counter()
zeros = np.zeros(257, np.float32)
encoded = encode_with_feedback(INT8, zeros, zeros, zeros.copy())
reduction = Reduction(codec_in=INT8, aggregator=AGGREGATORS["mean"], codec_out=INT8)
INT8.decode_untrusted(reduction.reduce_part([WeightedPart(encoded=encoded, weight=1.0)], 257), 257, zeros)
OUTER_OPTIMIZERS["nesterov"].apply(zeros.copy(), zeros.copy(), zeros, 0.7, 0.9)
print(json.dumps([(psutil.Process().memory_info().rss - before) / 2**20, time.perf_counter() - began_s]))
"""


def measure_loading() -> dict[str, float]:
    """What the first round's functions take in a fresh process: where nothing is kept yet, and then where they are."""
    figures = {}
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


def describe(codec: Codec, elements: int, repeats: int) -> dict[str, float]:
    """What a codec costs and what it loses of normally distributed values, as a share of their root mean square."""
    values = np.random.default_rng(2).standard_normal(elements, dtype=np.float32)
    payload = memoryview(bytearray(codec.encoded_bytes(elements)))
    out = np.empty(elements, np.float32)
    megabytes = elements * FLOAT32_BYTES / 1e6
    return {
        "bits": round(8 * payload.nbytes / elements, 3),
        "encode": measure(lambda: codec.encode(values, payload), megabytes, repeats),
        "check and decode": measure(lambda: codec.decode_untrusted(payload, elements, out), megabytes, repeats),
        "error": float(f"{np.sqrt(np.mean((values - out) ** 2) / np.mean(values**2)):.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what the numbers of a round cost one core")
    parser.add_argument("--elements", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    codecs = {name: describe(codec, options.elements, options.repeats) for name, codec in CODECS.items()}
    figures = {"codecs": codecs, **run(options.elements, options.repeats), "first use": measure_loading()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
