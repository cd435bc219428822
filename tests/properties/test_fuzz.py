"""Mutated inputs for every parser of bytes from outside: refused with a reason or taken, and nothing stays of them.

100,000 for each parser, together some 90 s of CPU. SHOAL_FUZZ_INPUTS sets another number, `make fuzz` takes 1,000,000;
SHOAL_FUZZ_SEED another seed. The seed and how to run one input again are printed with what fails.
"""

import ast
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, hlc_at
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, sign_batch
from shoal.crdt.kinds import EntryId, Kind
from shoal.crdt.ledger import Ledger, LedgerRules, Outcome
from shoal.crdt.pending import PendingBatches
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity
from tests.properties.fuzz import (
    INPUT_BYTES_MAX,
    FuzzError,
    Inputs,
    Parser,
    list_parsers,
    main,
    measure_memory,
    run_parser,
)

ROOT = Path(__file__).parents[2]
INPUTS = int(os.environ.get("SHOAL_FUZZ_INPUTS", "100000"))
SEED = int(os.environ.get("SHOAL_FUZZ_SEED", "1"))
MEMORY_INPUTS = 600
GROWN_BYTES_MAX = 64 * 1024
PEAK_BYTES_MAX = 8 * 1024 * 1024


@pytest.mark.parametrize("parser", list_parsers(), ids=lambda one: one.name)
def test_mutated_inputs_are_taken_or_refused_with_a_reason(parser: Parser) -> None:
    tally = run_parser(parser, SEED, INPUTS)
    assert tally.inputs == tally.accepted + sum(tally.refusals.values())
    # Mutation that only ever gets as far as the first check shows nothing.
    print(f"{parser.name}: seed {SEED}, {tally.inputs:,} inputs, {tally.ways} ways out, {dict(tally.refusals)}")
    assert tally.ways > 1 or not tally.refusals


@pytest.mark.parametrize("parser", list_parsers(), ids=lambda one: one.name)
def test_nothing_stays_of_what_was_refused(parser: Parser) -> None:
    used = measure_memory(parser, SEED, MEMORY_INPUTS, MEMORY_INPUTS)
    assert used.grown < GROWN_BYTES_MAX
    assert used.peak < PEAK_BYTES_MAX


@pytest.mark.parametrize("parser", list_parsers(), ids=lambda one: one.name)
def test_the_samples_are_taken(parser: Parser) -> None:
    taken = 0
    for raw in parser.samples():
        assert len(raw) <= INPUT_BYTES_MAX
        try:
            parser.take(raw)
            taken += 1
        except ProtocolError as error:
            # Random fields are rarely signed, or fit each other.
            assert error.refusal in (Refusal.BAD_SIGNATURE, Refusal.NOT_AUTHENTIC, Refusal.WRONG_LENGTH), parser.name
    assert taken or parser.name == "noise_payload"


def find_untrusted() -> Iterator[str]:
    for package in ("protocol", "crdt", "dht"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_untrusted"):
                    yield f"{module}.{node.name}"


def test_every_function_that_takes_bytes_from_outside_is_here() -> None:
    covered = {name for parser in list_parsers() for name in parser.covers}
    found = set(find_untrusted())
    assert len(found) > 12
    assert found - covered == {"protocol.state.check_chunk_untrusted"}, "it compares a digest: protocol.state's tests"


def test_an_input_follows_from_the_seed_and_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    parser = next(one for one in list_parsers() if one.name == "batch")
    first, again, other = Inputs(parser, 3), Inputs(parser, 3), Inputs(parser, 4)
    made = [first.next() for _ in range(50)]
    assert [again.next() for _ in range(50)] == made != [other.next() for _ in range(50)]
    assert main(["--parser", "batch", "--seed", "3", "--from", "40", "--count", "2"]) == 0
    assert "seed 3" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RecursionError(), MemoryError(), AssertionError()])
def test_anything_else_that_comes_out_is_found_and_says_how_to_see_it_again(error: Exception) -> None:
    calls = []

    def take(raw: bytes) -> None:
        calls.append(raw)
        if len(calls) % 1000 == 37:
            raise error
        raise ProtocolError(Refusal.MALFORMED, "no")

    bad = Parser(name="bad", take=take, samples=lambda: [b"\x93\x01\x02\x03"], covers=())
    with pytest.raises(FuzzError, match=r"make fuzz PARSER=bad SEED=5 FROM=36 COUNT=1"):
        run_parser(bad, 5, 100)


def test_memory_that_stays_or_is_taken_at_once_is_found() -> None:
    kept: list[bytes] = []
    keeps = Parser(name="keeps", take=lambda raw: kept.append(bytes(1000)), samples=lambda: [b"\x01"], covers=())
    assert measure_memory(keeps, 1, 10, 100).grown > GROWN_BYTES_MAX
    greedy = Parser(name="greedy", take=lambda raw: bytes(PEAK_BYTES_MAX), samples=lambda: [b"\x01"], covers=())
    used = measure_memory(greedy, 1, 10, 10)
    assert used.grown < GROWN_BYTES_MAX
    assert used.peak >= PEAK_BYTES_MAX


# -- signed by somebody ------------------------------------------------------------------------------------------------

LIARS = [Identity(bytes([number]) * 32) for number in range(200, 208)]
SWARM = b"s" * 32
FLOOD = 3000
LEDGER_BYTES_MAX = 256 * 1024


def flood(source: random.Random) -> Iterator[Batch]:
    """What strangers with good keys may sign: of the future, without ancestors, replayed, contradicting itself."""
    made: list[Batch] = []
    for _ in range(FLOOD):
        identity = source.choice(LIARS)
        start = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
        if source.random() < 0.4:
            start = ChainPosition(seq=source.randrange(1, 60_000), prev=EntryId(source.randbytes(32)), hlc=HLC_ZERO)
        hlc = hlc_at(source.choice((1, 1_763_700_000_000, 2**47)), source.randrange(30_000))
        deps = tuple(sorted(EntryId(source.randbytes(32)) for _ in range(source.choice((0, 0, 1, 8)))))
        content = EntryContent(deps=deps, hlc=hlc, kind=Kind.LEASE, body=source.randbytes(source.choice((8, 1000))))
        batch = source.choice(made) if made and source.random() < 0.2 else sign_batch(identity, SWARM, start, [content])
        made.append(batch)
        yield batch


def test_a_flood_of_signed_entries_stays_within_bounds() -> None:
    rules = LedgerRules(swarm=SWARM, owner=None, is_valid_snapshot=lambda *_: True)
    pending = PendingBatches(batches_max=100)
    ledger = Ledger(identity=LIARS[0], rules=rules, pending=pending, bytes_max=LEDGER_BYTES_MAX)
    refused: set[Refusal] = set()
    outcomes: set[str] = set()
    for batch in flood(random.Random(SEED)):
        if batch.author == LIARS[0].peer:
            continue
        try:
            outcome = ledger.accept(batch)
            outcomes |= {name for name in Outcome.__slots__ if getattr(outcome, name)}
        except ProtocolError as error:
            refused.add(error.refusal)
        assert len(ledger) * 1024 <= LEDGER_BYTES_MAX and len(pending) <= 100
    assert outcomes >= {"accepted", "wanted", "is_known", "is_full"}
    assert refused <= {Refusal.LIMIT, Refusal.MALFORMED}
    assert len(ledger.fold(1_763_700_000_000).excluded) <= len(LIARS)
    assert len(ledger.list_wanted()) <= 100 * 9
