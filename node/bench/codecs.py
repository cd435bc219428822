"""`shoal bench codecs`: what every codec costs one core, and what it loses."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.node.bench.rates import measure_rate
from shoal.protocol.codecs import CODECS, Codec, Float32s, encode_with_feedback, take_fresh

ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRates:
    """Rates in GB (10^9 bytes) of float32 a second of one core's time. `error` is the root mean square of what is lost
    of normally distributed values, as a share of their own."""

    codec: str
    bits: float
    encode: float
    encode_with_feedback: float
    decode: float
    error: float


def measure_codecs(elements: int, repeats: int, say: Callable[[str], None]) -> tuple[CodecRates, ...]:
    """One after the other."""
    found = []
    for name, codec in CODECS.items():
        say(name)
        found.append(measure_codec(codec, elements, repeats))
    return tuple(found)


def measure_codec(codec: Codec, elements: int, repeats: int) -> CodecRates:
    """Decoding includes the check of bytes from outside."""
    values = np.random.default_rng(2).standard_normal(elements, np.float32)
    payload, out = take_fresh(codec.encoded_bytes(elements)), np.empty(elements, np.float32)
    residual, residual_next = np.zeros_like(values), np.empty_like(values)

    def rate(work: Callable[[], object]) -> float:
        return measure_rate(work, values.nbytes, repeats, time.thread_time)

    feedback = rate(lambda: encode_with_feedback(codec, values, residual, residual_next, payload))
    encode = rate(lambda: codec.encode(values, payload))
    decode = rate(lambda: codec.decode_untrusted(payload, elements, out))
    return CodecRates(
        codec=codec.name,
        bits=8 * payload.nbytes / elements,
        encode=encode,
        encode_with_feedback=feedback,
        decode=decode,
        error=find_error(values, out),
    )


def find_error(values: Float32s, decoded: Float32s) -> float:
    """The root mean square of what is lost, as a share of the values' own."""
    return float(np.sqrt(np.mean((values - decoded) ** 2) / np.mean(values**2)))
