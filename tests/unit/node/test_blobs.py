"""The blob store on a real disk: what is read is what was named, whatever a power cut left."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from shoal.node import blobs
from shoal.node.blobs import BlobStore
from shoal.node.durability import sync_path

RAW = b"an encoded part" * 100


def name(raw: bytes) -> bytes:
    return blake3(raw).digest()


def path_of(folder: Path, digest: bytes) -> Path:
    return folder / digest.hex()[:2] / digest.hex()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_blob_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "deep" / "blobs")
    store.write(name(RAW), memoryview(RAW))
    store.sync([name(RAW)])
    for one in (store, BlobStore(tmp_path / "deep" / "blobs")):
        assert one.has(name(RAW))
        assert one.read(name(RAW)) == RAW
        assert one.stored_bytes == len(RAW)


def test_what_was_never_written_is_not_there(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert not store.has(name(RAW))
    assert store.read(name(RAW)) is None
    store.remove(name(RAW))
    assert store.stored_bytes == 0
    with pytest.raises(FileNotFoundError):
        store.sync([name(RAW)])


@pytest.mark.parametrize(
    "damaged",
    [b"", RAW[:-1], RAW + b"\x00", bytes(len(RAW)), b"A" + RAW[1:]],
    ids=["empty", "torn", "longer", "zeros", "one byte"],
)
def test_a_damaged_blob_is_not_there_and_makes_room_for_a_whole_one(tmp_path: Path, damaged: bytes) -> None:
    path = path_of(tmp_path, name(RAW))
    path.parent.mkdir()
    path.write_bytes(damaged)
    store = BlobStore(tmp_path)
    assert store.stored_bytes == len(damaged)
    assert store.read(name(RAW)) is None
    assert store.stored_bytes == 0 and files(tmp_path) == []
    store.write(name(RAW), RAW)
    assert store.read(name(RAW)) == RAW
    assert store.stored_bytes == len(RAW)


@pytest.mark.parametrize("damaged", [b"", RAW[:-1], bytes(len(RAW))], ids=["empty", "torn", "zeros"])
def test_writing_mends_what_a_power_cut_tore(tmp_path: Path, damaged: bytes) -> None:
    # A vote says that the bytes are on the disk; a torn file of that name must not pass for them.
    path = path_of(tmp_path, name(RAW))
    path.parent.mkdir()
    path.write_bytes(damaged)
    store = BlobStore(tmp_path)
    store.write(name(RAW), RAW)
    store.sync([name(RAW)])
    assert path.read_bytes() == RAW
    assert store.stored_bytes == len(RAW)


def test_a_blob_is_written_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.write(name(RAW), RAW)
    before = path_of(tmp_path, name(RAW)).stat()
    store.write(name(RAW), RAW)
    assert path_of(tmp_path, name(RAW)).stat() == before
    assert store.stored_bytes == len(RAW)


def test_a_write_that_was_cut_short_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.write(name(RAW), RAW)
    half = path_of(tmp_path, name(RAW)).with_name("abc.partial")
    half.write_bytes(b"half")
    store = BlobStore(tmp_path)
    assert not half.exists()
    assert store.stored_bytes == len(RAW)
    assert store.read(name(RAW)) == RAW


def test_a_write_that_a_full_disk_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(path: Path, raw: bytes) -> None:
        with path.open("wb") as file:
            file.write(raw[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    store = BlobStore(tmp_path)
    with monkeypatch.context() as patches:
        patches.setattr(Path, "write_bytes", fill_up)
        with pytest.raises(OSError, match="No space left"):
            store.write(name(RAW), RAW)
    assert files(tmp_path) == [] and store.stored_bytes == 0
    store.write(name(RAW), RAW)
    assert store.read(name(RAW)) == RAW


def test_what_was_not_made_durable_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # After a sync that failed, the file reads well from memory and the next sync succeeds; the disk may lack it.
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = BlobStore(tmp_path)
    store.write(name(RAW), RAW)
    with monkeypatch.context() as patches:
        patches.setattr(blobs, "sync_path", refuse)
        with pytest.raises(OSError, match="No space left"):
            store.sync([name(RAW)])
    before = path_of(tmp_path, name(RAW)).stat().st_ino
    assert store.read(name(RAW)) == RAW
    store.write(name(RAW), RAW)
    again = path_of(tmp_path, name(RAW)).stat().st_ino
    assert again != before
    store.sync([name(RAW)])
    store.write(name(RAW), RAW)
    assert path_of(tmp_path, name(RAW)).stat().st_ino == again, "now it is there"
    assert store.stored_bytes == len(RAW)


def test_removing_a_blob_frees_its_bytes_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for raw in (RAW, b"other"):
        store.write(name(raw), raw)
    store.remove(name(RAW))
    store.remove(name(RAW))
    assert not store.has(name(RAW))
    assert store.read(name(b"other")) == b"other"
    assert store.stored_bytes == len(b"other")
    store.write(name(RAW), RAW)
    assert store.read(name(RAW)) == RAW


def test_threads_may_write_the_same_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    raws = [bytes([number]) * 5000 for number in range(8)] * 4
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(store.write, name(raw), raw) for raw in raws]:
            done.result()
    assert all(store.read(name(raw)) == raw for raw in raws)
    assert len(files(tmp_path)) == 8
    assert BlobStore(tmp_path).stored_bytes == 8 * 5000


def test_many_blobs_are_spread_over_folders(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    raws = [bytes([number]) for number in range(50)]
    for raw in raws:
        store.write(name(raw), raw)
    store.sync(name(raw) for raw in raws)
    assert {path.parent.name for path in files(tmp_path)} == {name(raw).hex()[:2] for raw in raws}


def test_what_was_fetched_is_made_durable_at_once_and_not_with_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = BlobStore(tmp_path), list[Path]()
    own, others = b"own", [b"fetched 1", b"fetched 2", b"fetched 3"]
    store.write(name(own), own)
    for raw in others:
        store.write(name(raw), raw, fetched=True)
    monkeypatch.setattr(blobs, "sync_path", synced.append)
    store.sync([name(raw) for raw in (own, *others)])
    assert path_of(tmp_path, name(own)) in synced and path_of(tmp_path, name(others[0])) not in synced
    store.remove(name(others[2]))
    store.sync_fetched()
    assert {path_of(tmp_path, name(raw)) for raw in others[:2]} <= set(synced)
    synced.clear()
    store.sync_fetched()
    store.sync([name(others[0])])
    assert synced == []


def test_what_is_durable_is_not_made_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BlobStore(tmp_path).write(name(b"of an earlier process"), b"of an earlier process")
    store, synced = BlobStore(tmp_path), list[Path]()
    store.write(name(RAW), RAW)
    monkeypatch.setattr(blobs, "sync_path", synced.append)
    wanted = [name(RAW), name(b"of an earlier process")]
    store.sync(wanted)
    assert {path_of(tmp_path, one) for one in wanted} <= set(synced), "a process that was killed may not have done it"
    synced.clear()
    store.write(name(RAW), RAW)
    store.sync(wanted)
    assert synced == []
    store.remove(name(RAW))
    store.write(name(RAW), RAW)
    store.sync(wanted)
    assert path_of(tmp_path, name(RAW)) in synced and path_of(tmp_path, wanted[1]) not in synced


def test_a_blob_that_is_written_again_while_it_is_synced_is_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = BlobStore(tmp_path), list[Path]()
    store.write(name(RAW), RAW)

    def sync(path: Path) -> None:
        if not synced:
            store.remove(name(RAW))
            store.write(name(RAW), RAW)
        synced.append(path)

    monkeypatch.setattr(blobs, "sync_path", sync)
    store.sync([name(RAW)])
    synced.append(tmp_path)
    count = len(synced)
    store.sync([name(RAW)])
    assert path_of(tmp_path, name(RAW)) in synced[count:]


def test_a_fetched_blob_that_retention_removes_while_all_are_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)
    for raw in (b"one", b"other"):
        store.write(blake3(raw).digest(), raw, fetched=True)
    synced: list[Path] = []

    def sync(path: Path) -> None:
        if path.name == blake3(b"one").hexdigest():
            store.remove(blake3(b"one").digest())
        sync_path(path)
        synced.append(path)

    monkeypatch.setattr(blobs, "sync_path", sync)
    store.sync_fetched()
    # Once or twice, by which of the two came first.
    assert {path.name for path in synced if path.is_file()} == {blake3(b"other").hexdigest()}
    assert store.read(blake3(b"one").digest()) is None


def test_a_blob_that_cannot_be_read_is_not_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = BlobStore(tmp_path)
    digest = blake3(b"one").digest()
    store.write(digest, b"one")
    path = blobs.blob_path(tmp_path, digest)
    path.unlink()
    path.mkdir()
    assert store.read(digest) is None
    assert "cannot be read" in caplog.text
