"""The ledger benchmark's histories in pycrdt, run by `benchmarks.ledger` in an environment that has it.

    python benchmarks/pycrdt_histories.py ENTRIES AUTHORS

Prints one JSON object. Needs nothing of shoal.
"""

import json
import sys
import time
from typing import Any

from pycrdt import Doc, Map


def write_history(entries: int, authors: int) -> list[bytes]:
    """Every author sets its key in one shared map, in turn, and sends each change as an update."""
    docs = [Doc(client_id=number + 1) for number in range(authors)]
    maps = [doc.get("leases", type=Map) for doc in docs]
    updates = []
    for index in range(entries):
        doc, leases = docs[index % authors], maps[index % authors]
        before = doc.get_state()
        leases[str(index % authors)] = index.to_bytes(8, "big")
        updates.append(doc.get_update(before))
    return updates


def time_history(entries: int, authors: int) -> dict[str, Any]:
    updates = write_history(entries, authors)
    replica: Doc[Any] = Doc()
    leases = replica.get("leases", type=Map)
    begun = time.process_time()
    for update in updates:
        replica.apply_update(update)
    value = leases.to_py()
    seconds = time.process_time() - begun
    assert value is not None and len(value) == authors
    return {
        "entries": entries,
        "bytes": sum(map(len, updates)),
        "document_bytes": len(replica.get_update()),
        "applying_s": seconds,
        "entries_per_s": entries / seconds,
    }


def fork_a_client() -> dict[str, Any]:
    """Two processes write with one client id, as a restored backup, a cloned disk or a liar does. Two replicas hear of
    both in either order, and then exchange all that the other one's state vector leaves out."""
    updates = []
    for value in ("one", "other"):
        twin: Doc[Any] = Doc(client_id=7)
        twin.get("leases", type=Map)["7"] = value
        updates.append(twin.get_update())
    replicas: list[Doc[Any]] = [Doc(client_id=1), Doc(client_id=2)]
    maps = [replica.get("leases", type=Map) for replica in replicas]
    for replica, order in zip(replicas, (updates, updates[::-1]), strict=True):
        for update in order:
            replica.apply_update(update)
    left, right = replicas
    for _ in range(3):
        right.apply_update(left.get_update(right.get_state()))
        left.apply_update(right.get_update(left.get_state()))
    return {
        "values": [leases.to_py() for leases in maps],
        "replicas_agree": maps[0].to_py() == maps[1].to_py(),
        "state_vectors_equal": left.get_state() == right.get_state(),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {"pycrdt": time_history(int(sys.argv[1]), int(sys.argv[2])), "pycrdt_forked_client": fork_a_client()}
        )
    )
