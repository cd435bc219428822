"""Which cipher a machine prefers."""

import pytest

from shoal.node import cipher_speed
from shoal.node.cipher_speed import TRIES, is_chacha20_faster


class Slow:
    """A cipher that moves a clock by what it takes; every other record takes a hundred times as long."""

    def __init__(self, clock: list[float], record_s: float) -> None:
        self._clock = clock
        self._record_s = record_s
        self._records = 0

    def encrypt_into(self, nonce: bytes, plain: bytes, associated: None, out: bytearray) -> None:
        self._records += 1
        self._clock[0] += self._record_s * (100 if self._records % 2 else 1)


@pytest.mark.parametrize(("aes_s", "chacha20_s", "expected"), [(1.0, 3.0, False), (3.0, 1.0, True)])
def test_the_faster_one_by_its_fastest_record(
    monkeypatch: pytest.MonkeyPatch, aes_s: float, chacha20_s: float, expected: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cipher_speed, "AESGCM", lambda key: Slow(clock, aes_s))
    monkeypatch.setattr(cipher_speed, "ChaCha20Poly1305", lambda key: Slow(clock, chacha20_s))
    monkeypatch.setattr(cipher_speed.time, "perf_counter", lambda: clock[0])
    is_chacha20_faster.cache_clear()
    try:
        assert is_chacha20_faster() is expected
    finally:
        is_chacha20_faster.cache_clear()
    assert TRIES >= 2
