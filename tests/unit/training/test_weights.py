"""Folders of trained weights: the digest as docs/tasks.md defines it, exact float32, and what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file

from shoal.node.training.weights import FIELD, INDEX_FILE, WEIGHTS_FILE, WeightsFolder
from shoal.protocol.errors import ConfigError

TENSORS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.array([1.5, -2.0], dtype=np.float16),
    "ä.mask": np.array([[True, False]]),
    "c.scalar": np.array(7, dtype=np.int64),
}
SHAPES = {name: one.shape for name, one in TENSORS.items()}
GOLDEN = "7e0cfac1ae71b1ad"


def digest_of(folder: Path) -> bytes:
    return WeightsFolder(folder).load(())[0]


def write(folder: Path, tensors: dict[str, Any] = TENSORS) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def refuse(folder: Path, word: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        WeightsFolder(folder).load(())
    assert caught.value.field == FIELD and word in caught.value.problem, caught.value.problem
    return caught.value


def test_the_digest_is_that_of_the_tensors_in_the_order_of_their_names(tmp_path: Path) -> None:
    words = {"float32": "F32", "float16": "F16", "bool": "BOOL", "int64": "I64"}
    content = b""
    for name in ("a.weight", "b.weight", "c.scalar", "ä.mask"):
        one, word = TENSORS[name], words[str(TENSORS[name].dtype)]
        content += struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(">I", len(word)) + word.encode()
        content += struct.pack(">I", one.ndim) + b"".join(struct.pack(">Q", size) for size in one.shape)
        content += struct.pack(">Q", one.nbytes) + one.tobytes()
    digest = digest_of(write(tmp_path))
    assert digest == blake3(content, derive_key_context="shoal weights").digest()
    assert digest.hex().startswith(GOLDEN), "it stands in manifests"


def test_how_tensors_are_divided_among_files_does_not_matter(tmp_path: Path) -> None:
    whole, parts = write(tmp_path / "whole"), tmp_path / "parts"
    parts.mkdir()
    placed = {}
    for number, names in enumerate((["c.scalar", "a.weight"], ["ä.mask"], ["b.weight"])):
        save_file({name: TENSORS[name] for name in names}, parts / f"part{number}.safetensors", {"format": "pt"})
        placed |= dict.fromkeys(names, f"part{number}.safetensors")
    (parts / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert digest_of(parts) == digest_of(whole)
    save_file(TENSORS, parts / "beside.safetensors")
    assert digest_of(parts) == digest_of(whole), "what the index does not name is not read"


@pytest.mark.parametrize(
    "change",
    [
        {"a.weight": np.array([1.5, -2.5], dtype=np.float16)},
        {"a.weight": np.array([1.5, -2.0], dtype=np.float32)},
        {"a.weight": np.array([[1.5, -2.0]], dtype=np.float16)},
        {"d.weight": np.zeros(1, dtype=np.float32)},
    ],
)
def test_a_value_a_type_a_shape_and_a_name_make_another_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    assert digest_of(write(tmp_path / "other", {**TENSORS, **change})) != digest_of(write(tmp_path / "whole"))


def test_values_are_widened_to_the_same_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_file

    values = torch.tensor([[1.0, -0.0, 3.14159, 1e-30], [6e4, 2.0**-24, -1.5, 0.1]])
    stored = {"f": values, "h": values.to(torch.float16), "b": values.to(torch.bfloat16), "i": values.to(torch.int32)}
    save_torch_file(stored, tmp_path / WEIGHTS_FILE)
    _, loaded = WeightsFolder(tmp_path).load(("f", "h", "b", "i"))
    assert set(loaded) == {"f", "h", "b"}
    for name, one in loaded.items():
        assert one.dtype == np.float32 and one.flags.writeable
        assert np.array_equal(one.view(np.uint32), stored[name].float().numpy().view(np.uint32))


def test_parameters_are_found_with_and_without_the_name_of_the_inner_model(tmp_path: Path) -> None:
    files = WeightsFolder(write(tmp_path))
    assert files.match([("b.weight", (2, 3)), ("model.a.weight", (2,))]) == {
        "b.weight": "b.weight",
        "model.a.weight": "a.weight",
    }
    for wanted, word in (
        (("z.weight", (2,)), "no tensor z.weight"),
        (("b.weight", (3, 2)), "[2, 3]"),
        (("ä.mask", (1, 2)), "BOOL"),
    ):
        with pytest.raises(ConfigError) as caught:
            files.match([wanted])
        assert caught.value.field == FIELD and word in caught.value.problem


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert "save_pretrained" in refuse(tmp_path, "pickle").fix
    write(tmp_path)
    assert digest_of(tmp_path) == digest_of(write(tmp_path / "alone")), "beside safetensors nobody reads it"


def test_what_is_no_folder_of_weights_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "has no model.safetensors")
    refuse(tmp_path / "absent", "is no folder")


def make_file(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no file of safetensors"),
        (b"\x80\x04", "no file of safetensors"),
        (make_file(entry(), length=2**63), "no file of safetensors"),
        (make_file(entry(), length=10_000), "no file of safetensors"),
        (make_file(b"{"), "damaged"),
        (make_file(b"[" * 100_000), "damaged"),
        (make_file([]), "damaged"),
        (make_file({"x": 3}), "'x'"),
        (make_file({"x": {"dtype": "F32"}}), "'x'"),
        (make_file(entry(dtype="F31")), "'x'"),
        (make_file(entry(dtype=[])), "'x'"),
        (make_file(entry(shape=(3,))), "'x'"),
        (make_file(entry(shape=(-2,), offsets=(8, 0))), "'x'"),
        (make_file(entry(shape=(2.0,))), "'x'"),
        (make_file(entry(offsets=(4, 12))), "'x'"),
        (make_file(entry(offsets=(0, 8, 9))), "'x'"),
        (make_file(entry(), data=bytes(7)), "'x'"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    assert str(tmp_path / WEIGHTS_FILE) in refuse(tmp_path, word).problem


@pytest.mark.parametrize(
    "index",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": {"x": "../model.safetensors"}}',
        b'{"weight_map": {"x": "/etc/passwd"}}',
        b'{"weight_map": {"x": "pytorch_model.bin"}}',
        b'{"weight_map": {"x": 3}}',
        b'{"weight_map": {"x": "absent.safetensors"}}',
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, index: bytes) -> None:
    inner = write(tmp_path / "inner")
    write(tmp_path)
    (inner / WEIGHTS_FILE).rename(inner / "other.safetensors")
    (inner / INDEX_FILE).write_bytes(index)
    refuse(inner, str(inner))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"x": np.zeros(2, dtype=np.float32)}, tmp_path / name)
    placed = {"x": "1.safetensors", "y": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": placed}))
    refuse(tmp_path, "another file")


def test_a_file_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    files = WeightsFolder(write(tmp_path))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="shorter"):
        files.load(())
