"""Eras: the ledger's unit of truncation, a function of the certified round alone.

Rounds 1 to n are of era 1, n+1 to 2n of era 2, and so on, n being the swarm's `rounds_per_era`, a multiple of its
snapshot period. An author has one chain in each era and names nothing of another era, so every era is a ledger of its
own, closed under ancestors, and can be dropped whole. PERMANENT_ERA holds the owner's decrees and is never dropped.

The current era is that of the newest certified round. A replica keeps it, the one before (whoever is a little behind
still writes there) and the one after (whoever is a little ahead writes there already).
"""

PERMANENT_ERA = 0
FIRST_ERA = 1
ERA_MAX = 2**32 - 1
ERAS_BEHIND = 1
ERAS_AHEAD = 1
ROUNDS_PER_ERA_MIN = 256


def choose_rounds_per_era(snapshot_every: int) -> int:
    """The least multiple of the swarm's snapshot period that is no less than ROUNDS_PER_ERA_MIN."""
    return snapshot_every * -(-ROUNDS_PER_ERA_MIN // snapshot_every)


def era_of_round(round_number: int, rounds_per_era: int) -> int:
    """The era of a certified round; round 0, the manifest itself, is of the first one."""
    return FIRST_ERA + max(0, round_number - 1) // rounds_per_era


def oldest_kept(era: int) -> int:
    """The oldest era, apart from the permanent one, that counts while `era` is the current one."""
    return max(FIRST_ERA, era - ERAS_BEHIND)


def last_settled_round(era: int, rounds_per_era: int) -> int:
    """The last round of the eras that do not count any more while `era` is the current one."""
    return (oldest_kept(era) - FIRST_ERA) * rounds_per_era
