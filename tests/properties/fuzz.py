"""Mutation fuzzing of everything that takes bytes from outside: the engine, and the parsers with their corpora.

An input starts as a valid one. Most are changed byte by byte: flipped, cut, repeated, spliced with another, given a
length that lies, buried in arrays. The others are changed as the tree that they encode, so that they get past the
decoder to the bounds behind it. What comes out in a new way (another refusal, another reason) joins the corpus, up to
CORPUS_MAX; so later inputs go on from where earlier ones got to.

Everything follows from the seed and the number of an input: `make fuzz PARSER=batch SEED=7 FROM=1234 COUNT=1` runs one
again.
"""

import argparse
import gc
import random
import re
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

import msgpack

from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import forget_signatures

CORPUS_MAX = 256
INPUT_BYTES_MAX = 80 * 1024
EDITS_MAX = 6
# What announces a length or a type to msgpack, and what tends to be a border.
MARKERS = bytes.fromhex("00017f8090919cc0c2c3c4c5c6c7c9cacbcccdcecfd0d3d4d9dadbdcdddedfe0ff")
_LIES = "ddffffffff dcffff c6ffffffff c5ffff dbffffffff dfffffffff c9ffffffff00 cfffffffffffffffff"
LIES = tuple(bytes.fromhex(text) for text in _LIES.split(" "))
NUMBERS = (0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
FLOATS = (0.0, -0.0, float("nan"), float("inf"), -1e308, 5e-324)

_VARYING = re.compile(r"[0-9a-fA-F]*[0-9][0-9a-fA-F]*|[^ ]*[^ a-zA-Z_.,:][^ ]*")

Take = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """`take` hands bytes to what is tested; `samples` are valid; `covers` names the functions that it is about."""

    name: str
    take: Take
    samples: Callable[[], Sequence[bytes]]
    covers: tuple[str, ...]
    is_packed: bool = True
    fixed_bytes: int | None = None


@dataclass(slots=True)
class Tally:
    """What came of the inputs."""

    inputs: int = 0
    accepted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    ways: int = 0


class FuzzError(AssertionError):
    """Something came out that must not: not a ProtocolError, or too much memory. Names what runs it again."""


class Inputs:
    """The inputs of one parser and seed, one after the other."""

    def __init__(self, parser: Parser, seed: int) -> None:
        self._parser = parser
        self._source = random.Random(f"{parser.name}/{seed}")
        self.corpus = list(parser.samples())
        assert self.corpus, "mutation starts from valid inputs"

    def next(self) -> bytes:
        """A new input."""
        source = self._source
        raw = source.choice(self.corpus)
        if self._parser.is_packed and source.random() < 0.5:
            mutated = self._mutate_tree(raw)
        else:
            mutated = self._mutate_bytes(raw)
        if self._parser.fixed_bytes is not None:
            mutated = mutated[: self._parser.fixed_bytes].ljust(self._parser.fixed_bytes, b"\0")
        return mutated[:INPUT_BYTES_MAX]

    def keep(self, raw: bytes) -> None:
        """The input came to something new: go on from it, too."""
        if len(self.corpus) < CORPUS_MAX and len(raw) <= 4096:
            self.corpus.append(raw)

    def _mutate_bytes(self, raw: bytes) -> bytes:
        source = self._source
        out = bytearray(raw)
        for _ in range(source.randint(1, EDITS_MAX) if source.random() < 0.5 else 1):
            at = source.randrange(len(out) + 1)
            match source.randrange(10):
                case 0 | 1 if at < len(out):
                    out[at] ^= 1 << source.randrange(8)
                case 2 if at < len(out):
                    out[at] = source.choice(MARKERS)
                case 3:
                    out[at:at] = source.choice(LIES)
                case 4:
                    del out[at : at + source.choice((1, 2, 4, 32, 1000))]
                case 5:
                    out[at:at] = out[at : at + source.choice((1, 8, 64))]
                case 6:
                    other = source.choice(self.corpus)
                    out[at:] = other[source.randrange(len(other) + 1) :]
                case 7:
                    del out[at:]
                case 8:
                    out[at:at] = source.randbytes(source.choice((1, 3, 33)))
                case _:
                    out[at:at] = source.choice((b"\x91", b"\x92\x01", b"\x81")) * source.choice((1, 20, 600))
        if source.random() < 0.002:
            out += source.choice((b"\xc0", b"\x91", b"\x00")) * INPUT_BYTES_MAX
        return bytes(out)

    def _mutate_tree(self, raw: bytes) -> bytes:
        try:
            tree = msgpack.unpackb(raw, raw=False, strict_map_key=False)
            return bytes(msgpack.packb(self._change(tree), use_bin_type=True))
        except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException):
            return self._mutate_bytes(raw)

    def _change(self, tree: object) -> object:
        """Another value somewhere in the tree."""
        source = self._source
        if isinstance(tree, list) and tree and source.random() < 0.9:
            at = source.randrange(len(tree))
            changed = list(tree)
            match source.randrange(12):
                case 0:
                    del changed[at]
                case 1:
                    changed.insert(at, changed[at])
                case 2:
                    other = source.randrange(len(tree))
                    changed[at], changed[other] = changed[other], changed[at]
                case 3:
                    changed *= source.choice((2, 30))
                case _:
                    changed[at] = self._change(changed[at])
            return changed
        if isinstance(tree, bytes):
            return self._change_bytes(tree)
        if isinstance(tree, bool) or tree is None:
            return source.choice((None, True, False, 0, b""))
        if isinstance(tree, int):
            return source.choice((*NUMBERS, tree + 1, tree - 1, tree ^ 1 << source.randrange(31)))
        if isinstance(tree, float):
            return source.choice((*FLOATS, tree * 2, -tree, 1))
        if isinstance(tree, str):
            return source.choice(("", tree + "x", tree[:-1], "\0", "é" * 40, tree * 50, "\u202e"))
        return source.choice((None, 0, b"", "", [], [[]]))

    def _change_bytes(self, raw: bytes) -> bytes:
        source = self._source
        if raw and source.random() < 0.3:
            # Bytes within bytes: an entry in a message, a certificate in an entry.
            return self._mutate_tree(raw)
        flipped = bytearray(raw)
        if flipped:
            flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
        return source.choice((bytes(flipped), raw[:-1], raw + b"\0", b"", bytes(len(raw)), raw * 2))


def run_parser(parser: Parser, seed: int, count: int, first: int = 0) -> Tally:
    """Feed it inputs number `first` to `first + count`; those before are made and not fed. Raises FuzzError."""
    inputs, tally, seen = Inputs(parser, seed), Tally(), set[str]()
    for number in range(first + count):
        raw = inputs.next()
        try:
            parser.take(raw)
            way = "accepted"
            tally.accepted += number >= first
        except ProtocolError as error:
            # Where numbers and quoted pieces of the input differ, the way out is the same.
            way = f"{error.refusal}: {_VARYING.sub('#', error.detail)[:80]}"
            tally.refusals[error.refusal] += number >= first
        except MemoryError as error:
            raise _explain(parser, seed, number, raw, error) from error
        except (ArithmeticError, AssertionError, AttributeError, LookupError, NameError) as error:
            raise _explain(parser, seed, number, raw, error) from error
        except (OSError, RuntimeError, TypeError, ValueError, StopIteration) as error:
            raise _explain(parser, seed, number, raw, error) from error
        if way not in seen and len(seen) < 4 * CORPUS_MAX:
            seen.add(way)
            inputs.keep(raw)
    tally.inputs, tally.ways = count, len(seen)
    return tally


def _explain(parser: Parser, seed: int, number: int, raw: bytes, error: BaseException) -> FuzzError:
    again = f"make fuzz PARSER={parser.name} SEED={seed} FROM={number} COUNT=1"
    return FuzzError(
        f"{type(error).__name__} in {parser.name}: {error}; run it again: {again}; input {raw[:200].hex()}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes that stay after many inputs, and the most that were in use at once above what there was before."""

    grown: int
    peak: int


def measure_memory(parser: Parser, seed: int, warm: int, count: int) -> MemoryUse:
    """What `count` inputs leave behind and need, after `warm` of them have filled every cache."""
    inputs = Inputs(parser, seed)
    made = [inputs.next() for _ in range(warm + count)]

    def feed(raws: Iterator[bytes]) -> None:
        for raw in raws:
            try:
                parser.take(raw)
            except ProtocolError:
                pass

    # The table of good signatures is bounded, and counts whole where it is made larger: let it begin small.
    forget_signatures()
    # What was there before stays out of it: walking through all that a run of the tests has imported takes seconds.
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        feed(islice(made, warm))
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        feed(islice(made, warm, None))
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return MemoryUse(grown=after - before, peak=peak - before)


@cache
def list_parsers() -> tuple[Parser, ...]:
    """All of them; corpora are made when a parser is run."""
    from tests.properties.fuzz_parsers import PARSERS

    return PARSERS


def main(arguments: Sequence[str] | None = None) -> int:
    """`make fuzz`: prints a line for each parser."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs for each parser")
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--parser", help="one of them; default: all")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first input that counts")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    chosen = [one for one in list_parsers() if options.parser in (None, one.name)]
    assert chosen, f"no parser of that name: {', '.join(one.name for one in list_parsers())}"
    print(f"seed {seed}")
    for one in chosen:
        began_s = time.process_time()
        tally = run_parser(one, seed, options.count, options.first)
        used_s = time.process_time() - began_s
        each_us = 1e6 * used_s / (options.first + options.count)
        refused = ", ".join(f"{times} {reason}" for reason, times in tally.refusals.most_common(4))
        print(f"{one.name:<16} {tally.inputs:>9,} inputs {used_s:7.1f} s {each_us:5.0f} us each", end=" ")
        print(f"{tally.ways:>3} ways out: {tally.accepted} accepted, {refused}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
