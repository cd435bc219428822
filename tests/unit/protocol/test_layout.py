"""The model's layout and the bits of round 0."""

import copy
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol import layout as module
from shoal.protocol.errors import ManifestError, ProtocolError, Refusal
from shoal.protocol.layout import ELEMENTS_MAX, TENSORS_MAX, Layout, TensorSpec, initialise, make_layout
from shoal.protocol.state import chunk_digests, state_root
from shoal.protocol.wire import decode_record_untrusted, encode_record

EMBEDDING = TensorSpec(name="embedding", shape=(257, 33), init="uniform", std=1.0)
GAIN = TensorSpec(name="gain", shape=(33,), init="ones")
OUT = TensorSpec(name="out", shape=(33, 7))
HEAD = TensorSpec(name="head", shape=(7, 11), init="uniform", std=0.02)
LAYOUT = make_layout((EMBEDDING, GAIN, OUT, HEAD))


def test_tensors_follow_each_other_without_gaps() -> None:
    assert LAYOUT.elements == 257 * 33 + 33 + 33 * 7 + 7 * 11
    assert LAYOUT.offsets == (0, 8481, 8514, 8745)


def test_the_first_parameters_are_the_same_bits_everywhere() -> None:
    # If this fails, two versions of shoal no longer start a swarm from the same state.
    digest = blake3(initialise(LAYOUT, 2**63 - 1).tobytes()).hexdigest()
    assert digest == "7df049034f1ec1c0dd22994c79d858ff98442c08dfdf68250ccd9465a1c9ac52"
    assert LAYOUT.digest.hex() == "3ab49f5d407470035b79790d624fcc69cdb6842baa1d7bbfbc12e87f0d0676d0"


# Of LAYOUT with the seed 7: the first elements of "embedding" and of "head", in hexadecimal, and the root of round 0.
GOLDEN_FIRST = {
    "embedding": ["-0x1.f243de0000000p-1", "0x1.46d28c0000000p-3", "-0x1.4aad2c0000000p-3", "0x1.d078b00000000p-3"],
    "head": ["-0x1.e906f00000000p-8", "-0x1.da20a00000000p-6", "-0x1.e4d8a60000000p-7", "0x1.7e17040000000p-6"],
}
GOLDEN_ROOT = "a14168fe555f58d1829beec036384322f3f097e5008fe493eff1006a93400098"


def philox(key: int, counter: int) -> tuple[int, ...]:
    """Philox4x64-10 as protocol/README.md, "Round 0", has it: its four words for one counter."""
    mask = 2**64 - 1
    c0, c1, c2, c3 = counter, 0, 0, 0
    k0, k1 = key & mask, key >> 64
    for _ in range(10):
        one, other = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = other >> 64 ^ c1 ^ k0, other & mask, one >> 64 ^ c3 ^ k1, one & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def start_plainly(spec: TensorSpec, seed: int) -> NDArray[np.float32]:
    """A tensor's elements by the words of protocol/README.md alone, one after the other."""
    if spec.init != "uniform":
        return np.full(spec.elements, {"zeros": 0.0, "ones": 1.0}[spec.init], np.float32)
    hasher = blake3(derive_key_context="shoal layout initialise")
    hasher.update(struct.pack(">Q", seed)).update(spec.name.encode())
    key = int.from_bytes(hasher.digest(length=16), "big")
    scale, values = np.float32(spec.std * 1.7320508075688772), []
    for place in range(spec.elements):
        word = philox(key, place // 8 + 1)[place // 2 % 4]
        drawn = word >> 32 if place % 2 else word & 0xFFFFFFFF
        values.append(np.float32(2 * (drawn >> 8) - (2**24 - 1)) * np.float32(2.0**-24) * scale)
    return np.array(values, np.float32)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_round_0_is_what_the_specification_says(seed: int) -> None:
    plain = np.concatenate([start_plainly(spec, seed) for spec in LAYOUT.tensors])
    assert initialise(LAYOUT, seed).tobytes() == plain.tobytes()


def test_the_state_root_of_round_0() -> None:
    flat = initialise(LAYOUT, 7)
    for spec, offset in zip(LAYOUT.tensors, LAYOUT.offsets, strict=True):
        if spec.init == "uniform":
            assert [float(one).hex() for one in flat[offset : offset + 4]] == GOLDEN_FIRST[spec.name]
    root = state_root(0, flat.size, chunk_digests(flat), chunk_digests(np.zeros_like(flat)))
    assert root.hex() == GOLDEN_ROOT


def test_its_elements_are_counted_of_a_copy_and_of_a_changed_one_too() -> None:
    assert LAYOUT.elements == sum(spec.elements for spec in LAYOUT.tensors)
    assert copy.deepcopy(LAYOUT).elements == LAYOUT.elements and copy.deepcopy(LAYOUT) == LAYOUT
    assert replace(LAYOUT, tensors=LAYOUT.tensors[:1]).elements == LAYOUT.tensors[0].elements


def test_each_tensor_starts_as_its_spec_says() -> None:
    flat = initialise(LAYOUT, 1)
    assert flat.dtype == np.float32
    uniform = flat[:8481]
    assert uniform.std() == pytest.approx(1.0, rel=0.02)
    assert abs(uniform.mean()) < 0.03
    assert math.sqrt(3.0) * 0.999 < np.abs(uniform).max() < math.sqrt(3.0)
    assert (flat[8481:8514] == 1.0).all()
    assert (flat[8514:8745] == 0.0).all()
    assert flat[8745:].std() == pytest.approx(0.02, rel=0.2)


def test_a_tensor_depends_on_the_seed_and_its_name_and_on_no_neighbour() -> None:
    alone = initialise(make_layout((HEAD,)), 1)
    assert (alone == initialise(LAYOUT, 1)[8745:]).all()
    assert (alone != initialise(make_layout((HEAD,)), 2)).mean() > 0.99
    assert (alone != initialise(make_layout((replace(HEAD, name="tail"),)), 1)).mean() > 0.99


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = initialise(LAYOUT, 5)
    monkeypatch.setattr(module, "_WORDS_PER_DRAW", 100)
    assert (initialise(LAYOUT, 5) == whole).all()


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ((), "layout.tensors"),
        (tuple(TensorSpec(name=f"t{index}", shape=(1,)) for index in range(TENSORS_MAX + 1)), "layout.tensors"),
        ((GAIN, replace(OUT, name="gain")), "layout.gain.name"),
        ((replace(GAIN, name=""),), "layout..name"),
        ((replace(GAIN, name="é" * 65),), "layout.ééééé"),
        ((replace(GAIN, shape=(3, 0)),), "layout.gain.shape"),
        ((replace(GAIN, shape=()),), "layout.gain.shape"),
        ((replace(GAIN, shape=(1,) * 9),), "layout.gain.shape"),
        ((replace(GAIN, init="normal"),), "layout.gain.init"),
        ((replace(GAIN, std=0.5),), "layout.gain.std"),
        ((replace(HEAD, std=math.nan),), "layout.head.std"),
        ((replace(HEAD, std=math.inf),), "layout.head.std"),
        ((replace(HEAD, std=0.0),), "layout.head.std"),
        ((replace(HEAD, std=-0.1),), "layout.head.std"),
        ((replace(HEAD, shape=(ELEMENTS_MAX, 2)),), "layout.tensors"),
    ],
)
def test_what_breaks_a_bound_is_refused_by_name(tensors: tuple[TensorSpec, ...], field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        make_layout(tensors)
    assert caught.value.field.startswith(field)
    assert caught.value.fix
    with pytest.raises(ValueError, match="layout"):
        Layout(tensors=tensors)


def test_a_layout_survives_the_wire_and_a_hostile_one_does_not() -> None:
    raw = encode_record(LAYOUT)
    assert decode_record_untrusted(Layout, raw) == LAYOUT
    twins = raw.replace(b"\xa3out", b"\xa4gain")
    with pytest.raises(ProtocolError) as caught:
        decode_record_untrusted(Layout, twins)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE
    assert "twice" in caught.value.detail
