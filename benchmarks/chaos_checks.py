"""What must hold after a fault run, each check as a list of faults in words: empty means that it holds."""

import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_swarm import Sample, median_of
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.protocol.identity import format_peer_id
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.quorum import list_members
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

STUCK_S_MAX = 60.0
# Growth of a daemon from the third tenth of its life to its last: connections to whoever is there, caches that fill.
LIFE_S_MIN = 60.0
EARLY, LATE = (0.2, 0.35), (0.85, 1.0)
DESCRIPTORS_MORE_MAX = 32
RSS_FACTOR_MAX = 1.15
RSS_MIB_MORE_MAX = 24.0
LIVES_JUDGED = 3
SAMPLES_MIN = 10
COMPARED_SHARE_MIN = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedRound:
    """One round as a certificate tells it. `share` is the part of its members' work that went in, by peer."""

    round: int
    base_root: str
    digest: str
    tokens: int
    members: tuple[str, ...]
    share: Mapping[str, float]


def read_log(folder: Path) -> dict[int, CertifiedRound]:
    """Every certificate in the store of a peer that has ended; raises StoreError."""
    with LedgerStore.open(folder / "ledger.sqlite") as store:
        last = store.get_last_certificate()
        stored = store.list_certificates(0, last.round + 1) if last else ()
    return {one.round: _describe(decode_record_untrusted(Certificate, one.body, DELTA_BYTES_MAX)) for one in stored}


def _describe(certificate: Certificate) -> CertifiedRound:
    result = certificate.result
    names = [format_peer_id(member.peer) for member in result.members]
    counts = [0] * len(names)
    for part in result.parts:
        for index in list_members(part.contributors, len(names)):
            counts[index] += 1
    share = {name: count / max(1, len(result.parts)) for name, count in zip(names, counts, strict=True)}
    return CertifiedRound(
        round=result.round,
        base_root=result.base_root.hex(),
        digest=digest_record(result).hex(),
        tokens=round(sum(member.tokens * share[name] for member, name in zip(result.members, names, strict=True))),
        members=tuple(name for name in names if share[name]),
        share=share,
    )


def merge_logs(folders: Mapping[str, Path]) -> tuple[dict[int, CertifiedRound], int, list[str]]:
    """The log of all peers' folders, how many (round, folder) pairs were compared, and where two differ."""
    merged: dict[int, CertifiedRound] = {}
    compared, faults = 0, []
    for name, folder in folders.items():
        try:
            log = read_log(folder)
        except StoreError as error:
            faults.append(f"{name}: {error}")
            continue
        for number, one in log.items():
            known = merged.setdefault(number, one)
            if (known.digest, known.base_root) != (one.digest, one.base_root):
                faults.append(f"round {number}: {name} holds another result than the peers before it")
            compared += known is not one
    return merged, compared, faults


def check_roots(
    seen: Mapping[int, Mapping[str, str]], log: Mapping[int, CertifiedRound]
) -> tuple[dict[str, Any], list[str]]:
    """Whatever roots peers showed for a round (by round and peer) are the same, and what the next certificate names."""
    faults = []
    shown = {number: roots for number, roots in seen.items() if number > 0}
    for number, roots in shown.items():
        if len(set(roots.values())) > 1:
            faults.append(f"round {number}: {', '.join(f'{name} {root}' for name, root in roots.items())}")
        following = log.get(number + 1)
        if following is not None and any(root != following.base_root for root in roots.values()):
            faults.append(f"round {number}: shown with another root than round {number + 1} was certified on")
    certified = max(log, default=0)
    compared = sum(len(roots) >= 2 for roots in shown.values())
    if compared < COMPARED_SHARE_MIN * certified:
        faults.append(f"only {compared} of {certified} rounds were seen at two peers or more")
    figures = {"rounds_certified": certified, "rounds_compared": compared}
    figures["roots_compared"] = sum(len(roots) for roots in shown.values())
    return figures, faults


def check_progress(stuck_s: float) -> list[str]:
    """No standstill: `stuck_s` is the longest wait for a certified round while a quorum was there."""
    return [] if stuck_s <= STUCK_S_MAX else [f"no certified round for {stuck_s:.0f} s while a quorum was live"]


def check_growth(all_lives: Iterable[tuple[str, list[Sample]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Descriptors and memory of the daemons that lived longest, of all incarnations."""
    lives = [(name, life) for name, life in all_lives if len(life) >= SAMPLES_MIN]
    lives = [(name, life) for name, life in lives if life[-1].at_s - life[0].at_s >= LIFE_S_MIN]
    lives.sort(key=lambda one: one[1][0].at_s - one[1][-1].at_s)
    figures, faults = [], []
    for name, life in lives[:LIVES_JUDGED]:
        (fds, rss), (fds_late, rss_late) = median_of(life, *EARLY), median_of(life, *LATE)
        figures.append(
            {
                "peer": name,
                "life_s": round(life[-1].at_s - life[0].at_s),
                "descriptors_early": fds,
                "descriptors_late": fds_late,
                "rss_mib_early": rss,
                "rss_mib_late": rss_late,
            }
        )
        if fds_late > fds + DESCRIPTORS_MORE_MAX:
            faults.append(f"{name}: {fds:.0f} descriptors became {fds_late:.0f}")
        if rss_late > rss * RSS_FACTOR_MAX + RSS_MIB_MORE_MAX:
            faults.append(f"{name}: {rss:.0f} MiB became {rss_late:.0f}")
    if not lives:
        faults.append(f"no daemon lived {LIFE_S_MIN:.0f} s, so growth was not judged")
    return figures, faults


def check_logs(logs: Mapping[str, str]) -> list[str]:
    """No daemon met an exception that nobody expected."""
    return [f"{name}: a traceback in its log" for name, log in logs.items() if "Traceback" in log]


def describe_gaps(seen_s: Mapping[int, float]) -> dict[str, float]:
    """Times between certified rounds, as they were seen from outside."""
    times = [seen_s[number] for number in sorted(seen_s)]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    if not gaps:
        return {}
    return {
        "median_s": round(statistics.median(gaps), 2),
        "p95_s": round(gaps[int(0.95 * (len(gaps) - 1))], 2),
        "max_s": round(gaps[-1], 2),
    }
