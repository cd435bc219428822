"""A data set that is streamed: batches follow from their index, no document comes twice in an epoch, restarts go on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from blake3 import blake3

from shoal.node.training import datasets_library, document_stream, streamed
from shoal.node.training.datasets_library import INSTALL_DATASETS, ROWS_JUDGED, DatasetFiles, choose_hub_access
from shoal.node.training.document_stream import CLASSES, DocumentStream, Place, choose_documents, hash_document
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, DatasetChoice, Evaluate, Evaluated, Failed, Ready, Work
from shoal.node.training.streamed import POSITION_FILE, StreamPosition, StreamWindows, open_stream
from shoal.node.training.tasks import ReadsDatasets, TakesFiles, describe, make_task
from shoal.node.training.tokenizer import ByteTokenizer, FileTokenizer
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.lm_samples import GPT2, make_lm_task, write_parquet, write_tokenizer
from tests.unit.training.tiny import TRAINING, make_memory, make_start, make_work

CONTEXT = 32
ROWS = 400
CHUNK_TOKENS = 1 << 14
WORK = make_work()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="an extra")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")


def make_text(number: int) -> str:
    """Some 300 bytes that name their document."""
    return f"<{number:06d}>" + f" line {number} of some text\n" * 12


def write_lines(path: Path, first: int, count: int = ROWS, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: make_text(first + at), "n": at}) + "\n" for at in range(count)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_lines(tmp_path / "data" / f"part{number}.jsonl", ROWS * number)
    return tmp_path / "data"


def open_files(path: Path, **choice: Any) -> DatasetFiles:
    return DatasetFiles(DatasetChoice(path=str(path), **choice), path.parent / "cache")


def open_windows(path: Path, home: Path | None = None, work: Work = WORK, **choice: Any) -> StreamWindows:
    return open_stream(
        DatasetChoice(path=str(path), **choice), ByteTokenizer(), context=CONTEXT, work=work, folder=home
    )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    init = StreamWindows.__init__

    def with_small(self: StreamWindows, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named, chunk_tokens=CHUNK_TOKENS)

    monkeypatch.setattr(StreamWindows, "__init__", with_small)


def take(files: DatasetFiles, count: int, *, peer: bytes = b"p" * 32, place: Place | None = None) -> list[str]:
    stream = DocumentStream(files, 7, peer, frozenset(), place or Place())
    return [next(stream) for _ in range(count)]


# -- the library -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt", "folder"])
def test_tables_of_every_kind_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"texts.{kind}"
    texts = [f"text {number}" for number in range(9)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "parquet":
        write_parquet(path, {"text": texts, "n": list(range(9))})
    elif kind == "csv":
        path.write_text("text\n" + "\n".join(texts) + "\n")
    elif kind == "txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        path.mkdir()
        write_parquet(path / "a.parquet", {"text": texts})
    files = open_files(path)
    assert files.count == 1
    assert list(files.read(0, None)) == texts


def test_of_a_wide_parquet_table_one_column_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "wide.parquet", {"body": ["a", "b"], "image": [b"x" * 9, b"y" * 9], "n": [1, 2]})
    files = open_files(path, column="body")
    assert list(files.read(0, None)._rows) == [{"body": "a"}, {"body": "b"}]
    with pytest.raises(ConfigError, match="body, image, n"):
        files = open_files(path)
        list(files.read(0, None))
        files.judge_rows()


def test_a_reader_goes_on_from_its_state(folder: Path) -> None:
    files = open_files(folder)
    assert files.count == 3
    reader = files.read(1, None)
    documents = iter(reader)
    first = [next(documents) for _ in range(150)]
    state = json.loads(json.dumps(reader.state()))
    assert first + list(files.read(1, state)) == [make_text(ROWS + at) for at in range(ROWS)]


def test_another_column_split_and_configuration_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 0, column="content")
    assert len(list(open_files(path, column="content").read(0, None))) == ROWS
    with pytest.raises(ConfigError, match=r"trainer\.dataset_column") as caught:
        choose_documents(open_files(path), 100)
    assert f"{ROWS} of {ROWS} rows" in caught.value.problem and "content, n" in caught.value.fix
    with pytest.raises(ConfigError, match="has no configurations"):
        open_files(path, config_name="en")
    write_lines(tmp_path / "folder" / "train.jsonl", 0)
    with pytest.raises(ConfigError, match="nope"):
        open_files(tmp_path / "folder", split="nope")


def test_a_wrong_column_is_told_before_all_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 0, count=2 * ROWS_JUDGED, column="content")
    with pytest.raises(ConfigError, match=f"{ROWS_JUDGED} of {ROWS_JUDGED} rows"):
        list(open_files(path).read(0, None))


def test_rows_are_judged_when_the_data_are_opened_and_not_while_they_are_trained_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 0, count=100)
    with path.open("a") as file:
        file.writelines(json.dumps({"n": at}) + "\n" for at in range(2 * ROWS_JUDGED))
    files = open_files(path)
    assert len(list(islice(files.read(0, None), 100))) == 100
    files.judge_rows()
    assert len(list(files.read(0, None))) == 100


def test_rows_without_a_text_are_left_out_and_told(tmp_path: Path) -> None:
    rows = [{"text": make_text(number) if number % 4 else None} for number in range(ROWS)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = open_windows(path)
    assert f"{ROWS // 4} of the first {ROWS} rows have no text in 'text'" in windows.notice


def test_what_is_no_table_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="no table of texts"):
        open_files(tmp_path / "images")


def test_a_broken_or_missing_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\nno JSON\n")
    for name in ("a.parquet", "a.jsonl", "missing"):
        with pytest.raises(ConfigError, match=r"trainer\.dataset: .* cannot be read") as caught:
            choose_documents(open_files(tmp_path / name), 100)
        assert "a folder of them" in caught.value.fix


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError) as caught:
        open_files(folder)
    assert caught.value.fix == INSTALL_DATASETS == "install it: pip install 'shoal[datasets]'"


def test_the_hub_is_asked_only_where_one_of_its_data_sets_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
        monkeypatch.setenv(name, "elsewhere")
    for choice in (None, DatasetChoice(path="/data/a.jsonl"), DatasetChoice(path="owner/name")):
        choose_hub_access(choice, tmp_path)
        assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_HUB_CACHE"]) == ("1", "elsewhere")
    choose_hub_access(DatasetChoice(path="hf://datasets/owner/name"), tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    kept = {os.environ[name] for name in ("HF_HUB_CACHE", "HF_XET_CACHE")}
    assert kept == {str(tmp_path / "datasets" / "hub")}, "in the trainer's own folder"
    choose_hub_access(None)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("path", "revision"), [("hf://datasets/a/b", None), ("hf://datasets/a/b@v1.0", "v1.0")])
def test_what_the_library_is_asked_of_the_hub(tmp_path: Path, path: str, revision: str | None) -> None:
    """There is none where tests run."""
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []
    library = SimpleNamespace(load_dataset_builder=lambda *given, **named: asked.append((given, named)))
    datasets_library._open_builder(library, DatasetChoice(path=path, config_name="en"), tmp_path)
    assert asked == [(("hf://datasets/a/b", "en"), {"revision": revision, "cache_dir": str(tmp_path)})]


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, told to stay offline as a machine without a network is."""
    code = (
        "from shoal.node.training.datasets_library import DatasetFiles\n"
        "from shoal.node.training.messages import DatasetChoice\n"
        f"DatasetFiles(DatasetChoice(path='hf://datasets/owner/name'), __import__('pathlib').Path({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path)},
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert "trainer.dataset: the Hugging Face hub cannot be reached for hf://datasets/owner/name" in last
    assert "download the data set and give its folder" in last


# -- the order ---------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_document_once(folder: Path) -> None:
    everything = [make_text(number) for number in range(3 * ROWS)]
    files = open_files(folder)
    documents = take(files, 2 * len(everything))
    assert sorted(documents[: len(everything)]) == sorted(everything) == sorted(documents[len(everything) :])


def test_peers_begin_with_different_documents(folder: Path) -> None:
    files, count = open_files(folder), 3 * ROWS // CLASSES // 2
    begun = [frozenset(take(files, count, peer=bytes([number]) * 32)) for number in range(2 * CLASSES)]
    distinct = sum(not one & other for at, one in enumerate(begun) for other in begun[:at])
    pairs = len(begun) * (len(begun) - 1) // 2
    assert distinct > 0.75 * pairs, "seven of eight pairs are of different classes"
    assert take(files, count) == take(files, count)


@pytest.mark.parametrize("group", [7, 100, 1000])
def test_a_place_in_a_parquet_file_of_any_row_groups_leads_to_the_next_document(tmp_path: Path, group: int) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [make_text(number) for number in range(500)], "n": list(range(500))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    files = open_files(tmp_path / "a.parquet")
    everything = take(files, 700)
    stream = DocumentStream(files, 7, b"p" * 32, frozenset(), Place())
    for number in range(600):
        assert next(stream) == everything[number]
        if number % 53 == 0:
            place = replace(stream.place, state=json.loads(json.dumps(stream.place.state)))
            assert take(files, 2, place=place) == everything[number + 1 : number + 3]


def test_many_files_are_gone_through_in_orders_of_the_peers_own(tmp_path: Path) -> None:
    for number in range(document_stream.FILES_MIN):
        write_lines(tmp_path / "data" / f"{number:02d}.jsonl", 10 * number, count=10)
    files = open_files(tmp_path / "data")
    total = 10 * files.count
    one, other = (take(files, total, peer=peer * 32) for peer in (b"a", b"b"))
    assert sorted(one) == sorted(other) == [make_text(number) for number in range(total)]
    assert one != other
    assert [int(text[1:7]) % 10 for text in one] == list(range(10)) * files.count, "file by file"
    again = take(files, 2 * total, peer=b"a" * 32)
    assert again[:total] == one and again[total:] != one, "the next epoch has another order"


def test_a_place_leads_to_the_next_document(folder: Path) -> None:
    files = open_files(folder)
    everything = take(files, 2000)
    stream = DocumentStream(files, 7, b"p" * 32, frozenset(), Place())
    for number, text in enumerate(everything[:1500]):
        assert next(stream) == text
        if number % 97 == 0:
            assert take(files, 3, place=stream.place) == everything[number + 1 : number + 4]


def test_what_is_held_out_is_the_same_everywhere_and_never_trained_on(folder: Path) -> None:
    files = open_files(folder)
    held_out = choose_documents(files, 2000)
    assert held_out == choose_documents(open_files(folder), 2000)
    size = 3 * ROWS * len(make_text(0))
    assert 0.02 * size <= sum(map(len, held_out.texts)) < 0.03 * size
    assert held_out.hashes == {hash_document(text) for text in held_out.texts}
    kept = 3 * ROWS - len(held_out.texts)
    stream = DocumentStream(files, 7, b"p" * 32, held_out.hashes, Place())
    trained = [next(stream) for _ in range(2 * kept)]
    assert not set(trained) & set(held_out.texts)
    assert sorted(trained[:kept]) == sorted(trained[kept:]), "and all others are"


def test_a_document_that_comes_again_is_held_out_there_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", 0)
    write_lines(tmp_path / "data" / "b.jsonl", 0)
    files = open_files(tmp_path / "data")
    held_out = choose_documents(files, 2000)
    stream = DocumentStream(files, 7, b"p" * 32, held_out.hashes, Place())
    assert not {next(stream) for _ in range(2 * ROWS)} & set(held_out.texts)


def test_too_little_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bytes of text"):
        choose_documents(open_files(write_lines(tmp_path / "a.jsonl", 0, count=5)), 100)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 100_000}) + "\n")
    with pytest.raises(ConfigError, match="takes all of them"):
        choose_documents(open_files(tmp_path / "b.jsonl"), 100)


def test_data_that_are_all_held_out_meanwhile_end_a_batch_and_not_the_search(folder: Path) -> None:
    files = open_files(folder)
    everything = frozenset(hash_document(make_text(number)) for number in range(3 * ROWS))
    with pytest.raises(ValueError, match="no document to train on"):
        next(DocumentStream(files, 7, b"p" * 32, everything, Place()))


# -- batches -----------------------------------------------------------------------------------------------------------


def read_all(windows: StreamWindows, indices: Iterator[int] | range) -> list[bytes]:
    return [windows.batch(index).tobytes() for index in indices]


@pytest.mark.usefixtures("small_chunks")
def test_a_batch_follows_from_its_index_also_after_a_restart(folder: Path, tmp_path: Path) -> None:
    whole = read_all(open_windows(folder, tmp_path / "a"), range(400))
    assert len(set(whole)) == 400
    first = open_windows(folder, tmp_path / "b")
    assert first.batch(0).shape == (WORK.training.batch_size, CONTEXT + 1) and first.batch(0).dtype == np.int64
    assert read_all(first, range(150)) == whole[:150]
    assert len(json.loads((tmp_path / "b" / POSITION_FILE).read_text())["chunks"]) >= 2
    for index in (149, 150, 151, 77, 3, 260):
        again = open_windows(folder, tmp_path / "b")
        assert read_all(again, range(index, index + 40)) == whole[index : index + 40], index
        assert again.notice == ""


@pytest.mark.usefixtures("small_chunks")
def test_no_document_is_trained_on_twice_in_an_epoch_whatever_restarts(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    for first in range(0, 200, 25):
        windows = open_windows(folder, tmp_path / "home")
        for index in range(first, first + 25):
            text = b"".join(np.uint8(row[:-1]).tobytes() for row in windows.batch(index)).decode()
            seen += [
                int(text[at + 1 : at + 7]) for at in range(len(text) - 8) if text[at] == "<" and text[at + 7] == ">"
            ]
    assert len(seen) > 100 and len(seen) == len(set(seen))


@pytest.mark.usefixtures("small_chunks")
def test_the_same_batch_twice_and_an_earlier_one_are_the_same(folder: Path) -> None:
    windows = open_windows(folder)
    earlier, later = windows.batch(5), windows.batch(130)
    assert (windows.batch(130) == later).all() and (windows.batch(5) == earlier).all()


def test_every_buffer_is_shuffled_in_its_own_way(folder: Path) -> None:
    windows = open_windows(folder)
    orders = [windows._shuffle(50, first).tolist() for first in (0, 64, 128, 64)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3 and orders[1] == orders[3]


@pytest.mark.usefixtures("small_chunks")
def test_peers_and_seeds_draw_other_batches(folder: Path) -> None:
    works = [WORK, replace(WORK, peer=PeerId(b"q" * 32)), replace(WORK, seed=WORK.seed + 1)]
    assert len({open_windows(folder, work=work).batch(0).tobytes() for work in works}) == 3
    held_out = [open_windows(folder, work=work).held_out() for work in works]
    assert all((one == held_out[0]).all() for one in held_out)


@pytest.mark.usefixtures("small_chunks")
def test_another_data_set_begins_anew_and_says_so(folder: Path, tmp_path: Path) -> None:
    read_all(open_windows(folder, tmp_path / "home"), range(100))
    other = write_lines(tmp_path / "other.jsonl", 5000)
    work = replace(WORK, batches_done=100)
    changed = open_windows(other, tmp_path / "home", work)
    assert "where batch 100 was is not known" in changed.notice
    assert len(set(read_all(changed, range(100, 140)))) == 40
    assert open_windows(other, tmp_path / "home", replace(work, batches_done=120)).notice == ""
    assert "where batch 100" in open_windows(folder, tmp_path / "home", work).notice


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "of": "x", "chunks": 3}', "\x00"])
def test_a_position_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / POSITION_FILE).write_text(content)
    position = StreamPosition(tmp_path, b"me")
    assert position.is_empty and position.find(5) is None
    position.note(0, Place())
    assert StreamPosition(tmp_path, b"me").find(5) == (0, Place())


def test_positions_are_bounded_and_what_comes_later_is_void(tmp_path: Path) -> None:
    position = StreamPosition(tmp_path, b"me")
    last = 10 * streamed.CHUNKS_KEPT + 20
    for first in range(0, last + 1, 10):
        position.note(first, Place(number=first, state={"at": first}))
    again = StreamPosition(tmp_path, b"me")
    assert again.find(0) is None, "too long ago"
    assert again.find(last + 99) == (last, Place(number=last, state={"at": last}))
    again.note(last - 25, Place(number=1))
    assert again.find(last + 99) == (last - 25, Place(number=1))
    assert StreamPosition(tmp_path, b"other").is_empty


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_fails_costs_no_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(open_windows(folder), range(300))
    windows = open_windows(folder)
    read_all(windows, range(20))
    encode, left = ByteTokenizer.encode, [3]

    def fail(self: ByteTokenizer, texts: list[str]) -> list[list[int]]:
        left[0] -= 1
        if left[0] == 0:
            raise ConnectionError("the hub is gone")
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode", fail)
    index, failed = 20, 0
    found: list[bytes] = []
    while len(found) < 200:
        try:
            found.append(windows.batch(index).tobytes())
            index += 1
        except ConnectionError:
            failed += 1
    assert failed == 1 and found == whole[20:220]


def test_a_document_longer_than_the_buffer_is_used_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["".join(f"{number:07d}\n" for number in range(first, first + 40_000)) for first in (0, 10**6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *map(make_text, range(ROWS))]))
    files = open_files(path)
    work = WORK
    windows = StreamWindows(
        files, ByteTokenizer(), StreamPosition(None, b""), context=CONTEXT, work=work, chunk_tokens=CHUNK_TOKENS
    )
    sizes = []
    for index in range(0, 4000, 100):
        windows.batch(index)
        assert windows._chunk is not None
        sizes.append(windows._chunk.windows.shape[0] * CONTEXT)
    assert max(sizes) >= 320_000 - CONTEXT > CHUNK_TOKENS


def test_tokens_of_a_tokenizer_are_streamed(folder: Path, tmp_path: Path) -> None:
    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    choice = DatasetChoice(path=str(folder))
    windows = open_stream(choice, tokenizer, context=CONTEXT, work=WORK, folder=None)
    batch = windows.batch(0)
    assert int(batch.max()) < tokenizer.size
    assert "line" in tokenizer.decode(batch[0].tolist()).decode(errors="replace")


# -- the trainer -------------------------------------------------------------------------------------------------------


def test_a_trainer_learns_from_a_stream_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    start = replace(
        make_start(text=None), dataset=DatasetChoice(path=str(folder)), checkpoints=str(tmp_path / "trainer")
    )
    loop = InnerLoop(start, make_memory())
    assert loop.started().held_out_bytes > 0 and loop.started().notice == ""
    (before,) = loop.handle(Evaluate(), 0.0)
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    for _ in range(TRAINING.inner_steps):
        reports = list(loop.step(0.0))
    assert isinstance(reports[-1], Ready)
    batch = loop._batches.batch(TRAINING.inner_steps)
    again = InnerLoop(start, make_memory())
    assert again.started().resumed.batches_done == TRAINING.inner_steps
    assert (again._batches.batch(TRAINING.inner_steps) == batch).all()
    assert isinstance(before, Evaluated) and before.tokens == loop._batches.held_out_tokens


def test_a_causal_language_model_is_trained_on_the_tokens_of_a_stream(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="an extra")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    task = make_lm_task(GPT2, tokenizer=f"blake3:{blake3(tokenizer.read_bytes()).hexdigest()}")
    layout = describe(task)
    work = replace(make_work(), task=task, layout_digest=layout.digest)
    dataset = DatasetChoice(path=str(folder))
    start = replace(make_start(work, text=None), dataset=dataset, tokenizer=str(tokenizer))
    memory = np.full((2, layout.elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout, work.seed)
    loop = InnerLoop(start, memory)
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    reports = [report for _ in range(TRAINING.inner_steps) for report in loop.step(0.0)]
    assert isinstance(reports[-1], Ready) and reports[-1].loss_mean < 6.0
    (measured,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(measured, Evaluated)
    small = make_task(make_lm_task({**GPT2, "vocab_size": 260}, tokenizer=json.loads(task.options)["tokenizer"]))
    assert isinstance(small, ReadsDatasets) and isinstance(small, TakesFiles)
    small.take_files(tokenizer, None)
    with pytest.raises(ConfigError, match="vocab_size"):
        small.open_dataset(dataset, work, None)


def test_a_hub_that_goes_away_costs_batches_and_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = InnerLoop(replace(make_start(text=None), dataset=DatasetChoice(path=str(folder))), make_memory())
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    with monkeypatch.context() as patched:
        patched.setattr(DatasetFiles, "read", fail_to_connect)
        reports = [report for second in range(2) for report in loop.step(float(second))]
    assert [(type(one), one.fatal) for one in reports if isinstance(one, Failed)] == [(Failed, False)] * 2
    assert "ConnectionError" in reports[0].detail and "hub is gone" in reports[0].detail
    while loop.training:
        reports += loop.step(9.0)
    assert isinstance(reports[-1], Ready) and reports[-1].batches_done == TRAINING.inner_steps + 2


def fail_to_connect(self: DatasetFiles, number: int, state: object) -> NoReturn:
    raise ConnectionError("the hub is gone")


def test_a_task_that_reads_no_data_sets_says_so(folder: Path) -> None:
    pytest.importorskip("sklearn", reason="an extra")
    digits = Task(kind="digits", options=json.dumps({"width": 16}))
    layout = describe(digits)
    work = replace(make_work(), task=digits, layout_digest=layout.digest)
    start = replace(make_start(work, text=None), dataset=DatasetChoice(path=str(folder)))
    with pytest.raises(ConfigError, match="reads no data sets"):
        InnerLoop(start, np.zeros((2, layout.elements), np.float32))


def test_the_formats_hold_no_code() -> None:
    assert set(datasets_library.FORMATS) == {"arrow", "csv", "json", "parquet", "text"}
