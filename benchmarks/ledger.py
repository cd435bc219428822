"""What the ledger costs: processor time, disk, bytes on the wire, periods until all agree; and pycrdt beside it.

    python -m benchmarks.ledger [--only PART ...] [--rounds N] [--seeds N] [--json FILE]

Parts:

    speed       entries decoded, verified and folded per second and core, leases and certificates
    store       the SQLite file after --rounds rounds of 32 peers, with and without truncation, and the time to open it
    log         the certificates of --rounds rounds beside it, shortened behind their window; and a newcomer's way
    bytes       what it costs two stores of 10,000 entries to become equal, over control messages
    converge    64 replicas with 10,000 entries that never heard of each other, 20 % of all messages lost
    pycrdt      the histories of `speed` in pycrdt (Yjs), and what it makes of a forked client id

Times are processor time of this one process: other jobs on the machine distort them less than wall time. pycrdt is
installed into an environment of its own under build/; nothing of the project depends on it.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ledger_log import measure_log
from benchmarks.ledger_samples import (
    IDENTITIES,
    PEERS,
    QUORUM,
    START_MS,
    VOTERS,
    Row,
    clock,
    make_ledger,
    make_log,
    make_rules,
)
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.kinds import Kind, RegisterBody, RoundBody
from shoal.crdt.ledger import Draft, Ledger
from shoal.node.ledger_store import LedgerStore
from shoal.protocol.identity import forget_signatures
from shoal.protocol.wire import encode_record
from tests.properties.reconciliation_cost import LAYOUTS, MISSED_BY, Cost, compare, fill, make_pair, write_many
from tests.sim.replicas import measure_convergence, shared_verification

ENTRIES = 10_000
CERTIFICATES_TIMED = 300
PYCRDT = "pycrdt==0.14.13"
PYCRDT_ENV = Path("build/pycrdt-env")


# -- speed -------------------------------------------------------------------------------------------------------------


def write_leases(entries_per_batch: int) -> list[bytes]:
    """ENTRIES leases of eight bytes by 32 peers, in turn, as encoded batches."""
    ledgers = [make_ledger(number, with_rounds=False) for number in range(PEERS)]
    encoded = []
    for index in range(ENTRIES // entries_per_batch):
        values = (index * entries_per_batch + offset for offset in range(entries_per_batch))
        drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=value.to_bytes(8, "big"))) for value in values]
        batch = ledgers[index % PEERS].write(drafts, START_MS + index)
        ledgers[index % PEERS].accept(batch)
        encoded.append(encode_batch(batch))
    return encoded


def time_intake(encoded: list[bytes], entries: int, *, with_rounds: bool) -> Row:
    """Seconds and rates of each step from bytes to a fold."""
    batches: list[Batch] = []
    forget_signatures()
    decoding_s = clock(lambda: batches.extend(map(decode_batch_untrusted, encoded)))
    ledger = make_ledger(with_rounds=with_rounds)
    accepting_s = clock(lambda: [ledger.accept(batch) for batch in batches])
    folding_s = clock(lambda: ledger.fold(START_MS + 10**9))
    assert len(ledger) == entries
    return {
        "entries": entries,
        "batches": len(encoded),
        "bytes": sum(map(len, encoded)),
        "decoding_s": decoding_s,
        "accepting_s": accepting_s,
        "folding_s": folding_s,
        "entries_per_s": entries / (decoding_s + accepting_s + folding_s),
    }


def measure_speed() -> dict[str, Row]:
    rows = {
        f"leases, {size} a batch": time_intake(write_leases(size), ENTRIES // size * size, with_rounds=False)
        for size in (1, 16, 64)
    }
    writer, encoded = make_ledger(), []
    for certificate in make_log(CERTIFICATES_TIMED):
        body = RoundBody(round=certificate.result.round, value=encode_record(certificate))
        batch = writer.write([Draft(kind=Kind.CERTIFICATE, body=body)], START_MS + certificate.result.round)
        writer.accept(batch)
        encoded.append(encode_batch(batch))
    rows[f"certificates, {QUORUM} votes"] = time_intake(encoded, CERTIFICATES_TIMED, with_rounds=True)
    return rows


# -- store -------------------------------------------------------------------------------------------------------------


def measure_store(rounds: int, folder: Path) -> Row:
    """Two files of the same rounds, one of a ledger that truncates and one of a ledger that does not."""
    row: Row = {"rounds": rounds, "peers": PEERS, "voters": VOTERS, "votes": QUORUM}
    paths = {"truncated": folder / "truncated.sqlite", "whole": folder / "whole.sqlite"}
    write_stores(rounds, paths, row)
    for name, path in paths.items():
        row[f"{name}_bytes"] = path.stat().st_size
        row[f"{name}_open_s"], row[f"{name}_entries"] = open_store(path)
    return row


def write_stores(rounds: int, paths: dict[str, Path], row: Row) -> None:
    """As the daemon does: a lease of every peer in each era, a certificate a round. Fsyncs are left out."""
    ledger = make_ledger()
    leased_era = 0
    with LedgerStore.open(paths["truncated"]) as truncated, LedgerStore.open(paths["whole"]) as whole:
        for certificate in make_log(rounds):
            number = certificate.result.round
            body = encode_record(certificate)
            row["certificate_bytes"] = len(body)
            written = []
            if ledger.own_slot.era != leased_era:
                leased_era = ledger.own_slot.era
                written = write_era_leases(ledger, number)
            draft = Draft(kind=Kind.CERTIFICATE, body=RoundBody(round=number, value=body))
            written.append(ledger.write([draft], START_MS + 1000 * number))
            for batch in written:
                ledger.accept(batch)
            for store in (truncated, whole):
                store.append(written, own=False)
            done = ledger.truncate()
            if done is not None:
                truncated.truncate(done)
    row["era"] = ledger.era


def write_era_leases(ledger: Ledger, number: int) -> list[Batch]:
    """One of each peer, of the others as they would have come from them."""
    draft = Draft(kind=Kind.LEASE, body=RegisterBody(value=number.to_bytes(8, "big")))
    batches = [ledger.write([draft], START_MS + 1000 * number)]
    for identity in IDENTITIES[1:]:
        other = Ledger(identity=identity, rules=make_rules(with_rounds=True))
        if ledger.base.round:
            other.settle(ledger.base)
        batches.append(other.write([draft], START_MS + 1000 * number))
    return batches


def open_store(path: Path) -> tuple[float, int]:
    """Processor seconds from the file to a fold, every signature of a vote that counts checked; and entries."""
    begun = time.process_time()
    with LedgerStore.open(path) as store:
        ledger = make_ledger()
        ledger.restore(store.load(), store.load_base())
        state = ledger.fold(START_MS + 10**12)
        assert state.certificates, "the newest rounds count"
    return time.process_time() - begun, len(ledger)


# -- bytes and periods -------------------------------------------------------------------------------------------------


def measure_bytes(seeds: int) -> list[Row]:
    pool = write_many(ENTRIES)
    equal: Cost = compare(fill(pool), fill(pool))
    rows: list[Row] = [{"differences": 0, "bytes": equal.frame_bytes, "bound": 200}]
    for count in (1, 10, 100, 1000):
        for layout in LAYOUTS:
            of_layout = [measure_difference(pool, layout, count, by, seed) for by in MISSED_BY for seed in range(seeds)]
            rows.append(max(of_layout, key=lambda row: row["bytes"] / row["bound"]))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_difference(pool: list[Batch], layout: str, count: int, missed_by: str, seed: int) -> Row:
    entropy = random.Random(f"{count} {layout} {missed_by} {seed}")
    opener, other, _ = make_pair(pool, layout, count, missed_by, entropy)
    cost = compare(opener, other, seed=entropy.randrange(2**32))
    assert len(opener) == len(other) == ENTRIES
    return {
        "differences": count,
        "layout": layout,
        "missed_by": missed_by,
        "round_trips": cost.round_trips,
        "payload": cost.entry_bytes,
        "bytes": cost.frame_bytes,
        "bound": 2048 + 1.3 * cost.entry_bytes,
    }


def measure_periods(seeds: int) -> list[Row]:
    rows = []
    for seed in range(seeds):
        begun = time.process_time()
        with shared_verification():
            periods, swarm = measure_convergence(replicas=64, entries=ENTRIES, loss=0.2, seed=seed)
            assert len(swarm.fold_digests()) == 1
        traffic = swarm.traffic
        rows.append(
            {
                "seed": seed,
                "periods": periods,
                "messages": traffic.messages,
                "lost": traffic.lost,
                "bytes_a_replica": traffic.frame_bytes // 64,
                "simulation_s": time.process_time() - begun,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- pycrdt ------------------------------------------------------------------------------------------------------------


def measure_pycrdt() -> Row:
    """Run the script in an environment of its own, made on the first run; or why it cannot be had."""
    python = PYCRDT_ENV / "bin" / "python"
    try:
        if not python.exists():
            venv.create(PYCRDT_ENV, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PYCRDT], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"not measured": str(error)}
    script = Path(__file__).with_name("pycrdt_histories.py")
    done = subprocess.run([python, script, str(ENTRIES), str(PEERS)], check=True, capture_output=True, text=True)
    row: Row = json.loads(done.stdout)
    with shared_verification():
        encoded = write_leases(1)
        ledger = make_ledger(with_rounds=False)
        # Every signature is checked once before, so that what is timed is the merge alone, which is what pycrdt does.
        for raw in encoded:
            ledger.accept(decode_batch_untrusted(raw))
        row["shoal_without_signatures"] = time_intake(encoded, ENTRIES, with_rounds=False)
    row["shoal_forked_chain"] = fork_a_chain()
    return row


def fork_a_chain() -> Row:
    """What forks the client id in pycrdt: one key, two first entries, which reach two replicas in either order."""
    twins = [make_ledger(1, with_rounds=False), make_ledger(1, with_rounds=False)]
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=value)) for value in (b"one", b"other")]
    batches = [twin.write([draft], START_MS) for twin, draft in zip(twins, drafts, strict=True)]
    replicas = [make_ledger(2, with_rounds=False), make_ledger(3, with_rounds=False)]
    for replica, order in zip(replicas, (batches, batches[::-1]), strict=True):
        for batch in order:
            replica.accept(batch)
    states = [replica.fold(START_MS + 10**6) for replica in replicas]
    return {
        "replicas_agree": states[0].encode() == states[1].encode(),
        "authors_excluded": len(states[0].excluded),
        "proofs": [len(replica.list_evidence()) for replica in replicas],
    }


def main() -> None:
    parts = ("speed", "store", "log", "bytes", "converge", "pycrdt")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Callable[[], Any]] = {
            "speed": measure_speed,
            "store": lambda: measure_store(options.rounds, Path(folder)),
            "log": lambda: measure_log(options.rounds, Path(folder)),
            "bytes": lambda: measure_bytes(options.seeds),
            "converge": lambda: measure_periods(options.seeds),
            "pycrdt": measure_pycrdt,
        }
        for part in options.only:
            figures[part] = measures[part]()
            print(json.dumps({part: figures[part]}, indent=1), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
