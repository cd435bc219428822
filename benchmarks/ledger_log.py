"""What the certificates of many rounds take on the disk once old ones are dropped, and a newcomer's way over them."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.ledger_samples import (
    IDENTITIES,
    QUORUM,
    ROUNDS_PER_ERA,
    SWARM,
    VOTERS,
    Row,
    clock,
    make_certificate_result,
    make_rules,
)
from shoal.node.certificate_trail import CERTIFICATES_KEPT, CertificateTrail
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.protocol.identity import Identity
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.trail import Anchor, check_trail
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import certify


def measure_log(rounds: int, folder: Path) -> list[Row]:
    """The table of certificates alone, with voters that stay and with one who is replaced every few rounds."""
    return [measure_shortened(rounds, folder, replaced_every) for replaced_every in (0, 256, 16)]


def measure_shortened(rounds: int, folder: Path, replaced_every: int) -> Row:
    path = folder / f"log-{replaced_every}.sqlite"
    log = make_changing_log(rounds, replaced_every)
    most, shortening_s = 0, 0.0
    with LedgerStore.open(path) as store:
        genesis = Anchor(round=0, digest=SWARM, voters=tuple(one.peer for one in IDENTITIES[:VOTERS]))
        authority = make_rules(with_rounds=True).authority
        assert authority is not None, "a swarm with rounds"
        trail = CertificateTrail(store, genesis, authority)
        for first in range(1, rounds + 1, ROUNDS_PER_ERA):
            some = (next(log) for _ in range(min(ROUNDS_PER_ERA, rounds - first + 1)))
            rows = [
                StoredCertificate(
                    round=one.result.round, result_digest=digest_record(one.result), body=encode_record(one)
                )
                for one in some
            ]
            store.fill(batches=(), certificates=rows, abandoned=(), checkpoints=(), records={})
            begun_s = time.process_time()
            trail.shorten(rows[-1].round - CERTIFICATES_KEPT)
            shortening_s = max(shortening_s, time.process_time() - begun_s)
            most = max(most, path.stat().st_size)
        checkpoints = list(trail.load())
        walk_s = clock(lambda: check_trail(genesis, checkpoints, authority))
        sizes = [len(encode_record(one)) for one in checkpoints]
    row = {
        "rounds": rounds,
        "voter_replaced_every": replaced_every,
        "bytes": path.stat().st_size,
        "bytes_most": most,
        "checkpoints": len(checkpoints),
        "checkpoint_bytes": sum(sizes),
        "newcomer_checks_trail_s": walk_s,
        "longest_shortening_s": shortening_s,
    }
    print(json.dumps(row), flush=True)
    return row


def make_changing_log(rounds: int, replaced_every: int) -> Iterator[Certificate]:
    """The longest-serving voter goes every so many rounds and a new one comes; a quorum at random votes."""
    entropy, previous, born = random.Random(0), SWARM, VOTERS
    voters = list(IDENTITIES[:VOTERS])
    for number in range(1, rounds + 1):
        result = make_certificate_result(number, previous)
        following = list(voters)
        if replaced_every and number % replaced_every == 0:
            born += 1
            following = [*voters[1:], Identity(f"peer {born}".encode().ljust(32))]
        result = replace(result, voters=tuple(one.peer for one in following))
        yield certify(SWARM, result, entropy.sample(voters, QUORUM))
        previous, voters = digest_record(result), following
