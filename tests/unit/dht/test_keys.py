"""The keys of a swarm."""

from shoal.dht.keys import EPOCH_S, epoch_at, lookup_keys, presence_topic, provider_key

SWARM = bytes(range(32))


def test_a_key_is_a_sha2_256_multihash() -> None:
    key = provider_key(SWARM, 7)
    assert key[:2] == bytes((0x12, 0x20)) and len(key) == 34


def test_the_key_of_an_epoch_is_fixed_for_ever() -> None:
    # Another build that derives another key would look for this swarm in vain.
    assert provider_key(SWARM, 480_000).hex() == "1220faa8de43c4b1bec5e0470c4120f5330af40e8e0eeffca13018bf9ca28629846f"


def test_swarms_and_epochs_have_their_own_keys() -> None:
    keys = {provider_key(swarm, epoch) for swarm in (SWARM, bytes(32), b"") for epoch in (-1, 0, 1, 2**40)}
    assert len(keys) == 12


def test_the_current_epoch_is_looked_up_first() -> None:
    now_s = 1_750_000_000.5
    epoch = epoch_at(now_s)
    assert lookup_keys(SWARM, now_s) == tuple(provider_key(SWARM, at) for at in (epoch, epoch - 1, epoch + 1))


def test_clocks_that_differ_by_less_than_an_epoch_meet() -> None:
    for now_s in (0.0, 1_750_000_000.0, EPOCH_S * 1000 - 0.001):
        for skew_s in (-EPOCH_S + 1, -1.0, 0.0, 1.0, EPOCH_S - 1):
            announced = provider_key(SWARM, epoch_at(now_s + skew_s))
            assert announced in lookup_keys(SWARM, now_s)


def test_the_topic_names_the_swarm() -> None:
    assert presence_topic(SWARM) == f"shoal/{SWARM.hex()}"
