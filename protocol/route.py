"""How a peer that is behind gets to the swarm's head: by replaying updates, or by a snapshot and the updates after it.

Both lead to the same bits; what differs is how many bytes have to come and how much has to be computed. Updates are
fetched while earlier ones are applied, so replay takes the longer of the two, and the shorter of one round on top.

No clock in here: rates and times are what the shell has measured, or what is assumed of a peer that has measured
nothing yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

RATE_ASSUMED_BYTES_PER_S = 4e6  # of all donors together, before anything was fetched
APPLY_ASSUMED_ELEMENTS_PER_S = 5e7  # decode, outer step, hash, and the update to the disk
INSTALL_ASSUMED_ELEMENTS_PER_S = 1e8  # check a snapshot and take it over
# Replay keeps what the own trainer has done since its last base, a snapshot gives it up.
SNAPSHOT_GAIN_MIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotOffer:
    """A snapshot that donors have. `held_bytes` of it are on the own disk already; `bytes_per_s` is what its donors
    give together, None where nothing is measured."""

    round: int
    nbytes: int
    held_bytes: int = 0
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Where this peer stands and where the swarm does. Updates from round `updates_from` on can be had, at
    `bytes_per_s` from all donors together; `updates_held` of them are on the own disk already. `apply_s` and
    `install_s` were measured, or are None."""

    head: int
    target: int
    elements: int
    update_bytes: int
    updates_from: int
    updates_held: int = 0
    bytes_per_s: float | None = None
    apply_s: float | None = None
    install_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The choice. `snapshot` is None for replay alone. `nbytes` have to come, which takes about `seconds`."""

    snapshot: SnapshotOffer | None
    nbytes: int
    seconds: float


def choose_route(distance: Distance, offers: Sequence[SnapshotOffer]) -> Route | None:
    """The cheapest way that leads there; None where there is none, because nobody has kept what is missing."""
    replay = None
    if distance.updates_from <= distance.head + 1:
        replay = _replay(distance, distance.head, distance.updates_held)
    routes = [
        _by_snapshot(distance, offer)
        for offer in offers
        # The updates after it must be there, too. One round ahead it may be all that is left of that round: those who
        # made the round have gone, and those who took the snapshot have never had the update.
        if distance.head < offer.round <= distance.target and distance.updates_from <= offer.round + 1
    ]
    best = min(routes, key=lambda route: route.seconds, default=None)
    if replay is None or best is None:
        return replay or best
    return best if best.seconds * SNAPSHOT_GAIN_MIN < replay.seconds else replay


def _replay(distance: Distance, head: int, held: int) -> Route:
    rounds = max(0, distance.target - head)
    missing = max(0, rounds - held)
    rate = distance.bytes_per_s or RATE_ASSUMED_BYTES_PER_S
    fetch_s = distance.update_bytes / rate
    apply_s = distance.apply_s
    if apply_s is None:
        apply_s = distance.elements / APPLY_ASSUMED_ELEMENTS_PER_S
    seconds = max(missing * fetch_s, rounds * apply_s)
    if missing:
        seconds += min(fetch_s, apply_s)
    return Route(snapshot=None, nbytes=missing * distance.update_bytes, seconds=seconds)


def _by_snapshot(distance: Distance, offer: SnapshotOffer) -> Route:
    nbytes = max(0, offer.nbytes - offer.held_bytes)
    rate = offer.bytes_per_s or distance.bytes_per_s or RATE_ASSUMED_BYTES_PER_S
    install_s = distance.install_s
    if install_s is None:
        install_s = distance.elements / INSTALL_ASSUMED_ELEMENTS_PER_S
    # Updates that are held now lie before the snapshot, or they would have been replayed.
    rest = _replay(distance, offer.round, 0)
    return Route(snapshot=offer, nbytes=nbytes + rest.nbytes, seconds=nbytes / rate + install_s + rest.seconds)
