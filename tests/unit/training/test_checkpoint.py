"""The trainer's own memory on the disk: written whole or not at all, checked, bounded; and loops that go on from it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from shoal.node.training import checkpoint
from shoal.node.training.checkpoint import (
    CHECKPOINTS_KEPT,
    LIVES_KEPT,
    CheckpointStore,
    Journal,
    Position,
    Tally,
    digest_file,
)
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    EVERYTHING,
    NOTHING,
    OPTIMIZER,
    Begin,
    Merge,
    Ready,
    Report,
    Resumed,
)
from shoal.protocol.wire import decode_record_untrusted, encode_record
from tests.unit.training.tiny import layout, make_memory, make_start, make_work

POSITION = Position(
    round=3,
    batches_done=12,
    waits=True,
    local=Tally(steps=4, tokens=1024, loss_sum=20.5, age_s=1.5),
    pace=Tally(steps=4, tokens=1024, loss_sum=20.5, age_s=1.5),
)
TENSORS = {"model.w": torch.arange(12, dtype=torch.float32).view(3, 4), "optimizer.steps": torch.tensor(7)}
MERGE_ALL = Merge(round=2, included=b"\x01", part_elements=layout().elements, adopt_all=False, begin=True)


def open_store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, make_work())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    open_store(tmp_path).save(POSITION, TENSORS)
    found = open_store(tmp_path).load()
    assert found is not None and found.position == POSITION
    assert all(torch.equal(found.tensors[name], one) for name, one in TENSORS.items())


def test_a_checkpoint_of_an_older_version_is_read_as_it_was(tmp_path: Path) -> None:
    """The field that it has not takes no byte where it is 0."""
    assert len(encode_record(POSITION)) + 1 == len(encode_record(replace(POSITION, since_round=2)))
    assert decode_record_untrusted(Position, encode_record(POSITION)).since_round == 0


def test_a_restart_knows_when_the_base_was_last_adopted(tmp_path: Path) -> None:
    """The rounds that were missed before the checkpoint, too."""
    memory = make_memory()
    life = Life(tmp_path, memory, 0, [])
    life.tell(Begin(round=2, adopt=True), 0.0)
    assert life.step(0.0) is None
    life.tell(Begin(round=3, adopt=False), 0.0)
    life.tell(Begin(round=4, adopt=False), 0.0)
    assert life.step(0.0) is None
    life.loop.leave(0.0)
    again = Life(tmp_path, memory, 0, [])
    assert (again.resumed.round, again.resumed.since_round) == (4, 2)
    again.tell(Begin(round=5, adopt=False), 0.0)
    assert again.step(0.0) is None
    again.loop.leave(0.0)
    assert Life(tmp_path, memory, 0, []).resumed.since_round == 2, "through two restarts"
    again.tell(MERGE_ALL, 0.0)
    assert again.step(0.0) is None
    again.loop.leave(0.0)
    assert Life(tmp_path, memory, 0, []).resumed.since_round == MERGE_ALL.round


def test_a_fresh_folder_has_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "trainer", make_work())
    assert store.load() is None and not store.is_foreign and store.journal.lives() == []


def test_the_newest_counts_and_few_are_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(1, 6):
        store.save(replace(POSITION, batches_done=number), TENSORS)
        assert len(names(tmp_path)) <= 2 * CHECKPOINTS_KEPT
    found = open_store(tmp_path).load()
    assert found is not None and found.position.batches_done == 5
    open_store(tmp_path).save(replace(POSITION, batches_done=6), TENSORS)
    found = open_store(tmp_path).load()
    assert found is not None and found.position.batches_done == 6, "numbers go on after a restart"


@pytest.mark.parametrize("suffix", [checkpoint.TENSORS_SUFFIX, checkpoint.RECORD_SUFFIX])
def test_a_flipped_byte_makes_the_one_before_the_newest(tmp_path: Path, suffix: str) -> None:
    store = open_store(tmp_path)
    for number in (1, 2):
        store.save(replace(POSITION, batches_done=number), TENSORS)
    path = max(tmp_path.glob(f"*{suffix}"))
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        found = open_store(tmp_path).load()
        assert found is not None and found.position.batches_done == 1, at
    path.unlink()
    found = open_store(tmp_path).load()
    assert found is not None and found.position.batches_done == 1


def test_another_work_does_not_go_on_from_it(tmp_path: Path) -> None:
    open_store(tmp_path).save(POSITION, TENSORS)
    work = make_work()
    for other in (
        replace(work, seed=work.seed + 1),
        replace(work, generation=b"g" * 32),
        replace(work, training=replace(work.training, batch_size=9)),
    ):
        store = CheckpointStore(tmp_path, other)
        assert store.load() is None and store.is_foreign
    assert CheckpointStore(tmp_path, replace(work, batches_done=5)).load() is not None


def test_a_kill_at_any_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the folder fails in turn, as a kill at that moment would leave it."""

    class Killed(BaseException):
        pass

    calls = 0
    deadline = 10**9

    def count(original: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > deadline:
                raise Killed
            return original(*arguments, **options)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", count(safetensors.torch.save_file))
    for name in ("replace", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, count(getattr(Path, name)))
    seen = set()
    for deadline_now in range(12):
        folder = tmp_path / str(deadline_now)
        deadline, calls = 10**9, 0
        store = open_store(folder)
        for number in (1, 2):
            store.save(replace(POSITION, batches_done=number), TENSORS)
        deadline, calls = deadline_now, 0
        try:
            store.save(replace(POSITION, batches_done=3), TENSORS)
        except Killed:
            pass
        deadline, calls = 10**9, 0
        found = open_store(folder).load()
        assert found is not None
        seen.add(found.position.batches_done)
        assert not list(folder.glob("*.partial")), "what was cut short is removed"
    assert seen == {2, 3}


def test_a_full_disk_is_an_error_and_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.save(POSITION, TENSORS)

    def fail(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        store.save(replace(POSITION, batches_done=13), TENSORS)
    found = open_store(tmp_path).load()
    assert found is not None and found.position == POSITION


def test_random_states_go_on(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    torch.rand(3), np.random.standard_normal(3)  # an odd number, so that numpy keeps one back
    open_store(tmp_path).save(POSITION, TENSORS)
    expected = torch.rand(4), np.random.standard_normal(4)
    torch.manual_seed(9)
    np.random.seed(9)
    found = open_store(tmp_path).load()
    assert found is not None
    found.restore_random()
    assert torch.equal(torch.rand(4), expected[0]) and np.array_equal(np.random.standard_normal(4), expected[1])


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert digest_file(tmp_path / "a") == blake3(b"x" * 100_000).digest()


# -- the journal -------------------------------------------------------------------------------------------------------


def test_the_journal_knows_what_each_life_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "batches"
    for first, end in ((0, 7), (4, 4), (4, 20)):
        journal = Journal(path)
        journal.begin(first)
        for done in range(first + 1, end + 1):
            journal.note(done)
    assert Journal(path).lives() == [(0, 7), (4, 4), (4, 20)]
    assert path.read_text().split() == ["0", "7", "4", "4", "4", "20"], "people can read it"


def test_the_journal_is_bounded(tmp_path: Path) -> None:
    for number in range(LIVES_KEPT + 9):
        journal = Journal(tmp_path / "batches")
        journal.begin(number)
        journal.note(number + 1)
    lives = Journal(tmp_path / "batches").lives()
    assert lives == [(number, number + 1) for number in range(9, LIVES_KEPT + 9)]


# -- loops that go on --------------------------------------------------------------------------------------------------


class Life:
    """A trainer's life over a folder, with the daemon's answers. Batches that it drew stand in `drawn`."""

    def __init__(self, folder: Path, memory: np.ndarray[Any, Any], counted: int, drawn: list[int]) -> None:
        work = replace(make_work(), batches_done=counted)
        self.loop = InnerLoop(replace(make_start(work), checkpoints=str(folder)), memory)
        self.resumed: Resumed = self.loop.started().resumed
        self.memory = memory
        self._drawn = drawn

    def step(self, now_s: float) -> Ready | None:
        self._drawn.append(self.loop._batches_done)
        return find_ready(self.loop.step(now_s))

    def tell(self, command: Begin | Merge, now_s: float) -> Ready | None:
        return find_ready(self.loop.handle(command, now_s))


def find_ready(reports: Iterator[Report]) -> Ready | None:
    return next((one for one in list(reports) if isinstance(one, Ready)), None)


def apply(memory: np.ndarray[Any, Any]) -> None:
    """A round: half of the way from the base to what was handed over."""
    memory[0] += np.float32(0.5) * (memory[1] - memory[0])


def run_rounds(folder: Path, rounds: int, kills: Sequence[int]) -> tuple[list[bytes], list[list[int]], list[Resumed]]:
    """So many rounds, killed after each of these numbers of inner steps (counted over all lives): what was handed over
    in each round, the batches that each life drew, and how each life began."""
    memory, ready, counted, clock = make_memory(), None, 0, itertools.count()
    handed: list[bytes] = []
    lives: list[list[int]] = []
    resumed: list[Resumed] = []
    settled = -1
    left = sorted(kills)
    steps = 0

    def begin_life() -> tuple[Life, Ready | None]:
        lives.append([])
        memory[1] = np.nan
        life = Life(folder, memory, counted, lives[-1])
        resumed.append(life.resumed)
        was_counted = life.resumed.extent == EVERYTHING and life.resumed.batches_done == settled
        if was_counted:
            return life, life.tell(replace(MERGE_ALL, round=len(handed) + 1), next(clock))
        return life, life.tell(Begin(round=len(handed) + 1, adopt=life.resumed.extent != EVERYTHING), next(clock))

    life, ready = begin_life()
    while len(handed) < rounds:
        while ready is None:
            if left and steps >= left[0]:
                left.pop(0)
                life, ready = begin_life()
                continue
            ready = life.step(next(clock))
            steps += 1
        if left and steps >= left[0]:  # killed while it waits for the round
            left.pop(0)
            before = memory[1].tobytes()
            life, ready = begin_life()
            assert ready is not None and memory[1].tobytes() == before, "handed over again, to the bit"
        handed.append(memory[1].tobytes())
        counted = settled = ready.batches_done
        apply(memory)
        if left and steps >= left[0] - 1:  # killed after the round, before the trainer heard of it
            left.pop(0)
            life, ready = begin_life()
        else:
            ready = life.tell(replace(MERGE_ALL, round=len(handed) + 1), next(clock))
    return handed, lives, resumed


UNDISTURBED: list[list[bytes]] = []


def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    if not UNDISTURBED:
        UNDISTURBED.append(run_rounds(tmp_path_factory.mktemp("calm"), 3, ())[0])
    return UNDISTURBED[0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 16), max_size=5))
def test_a_trainer_that_is_killed_makes_the_same_contributions(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int]
) -> None:
    """Parameters, optimizer and position: whenever it is killed, each round gets the same bits from the same batches,
    and what was lost is known to the step."""
    handed, lives, resumed = run_rounds(tmp_path_factory.mktemp("killed"), 3, kills)
    assert handed == undisturbed(tmp_path_factory)
    effective: list[int] = []
    for drawn, began in zip(lives, resumed, strict=True):
        lost = len(effective) - began.batches_done
        assert began.steps_lost == max(0, lost), "said to the step"
        effective = effective[: began.batches_done] + drawn
        assert effective == list(range(len(effective))), "none twice, none skipped, in what counts"
    assert effective == list(range(12))


def test_on_leave_what_was_trained_since_ready_is_kept(tmp_path: Path) -> None:
    drawn: list[int] = []
    life = Life(tmp_path, make_memory(), 0, drawn)
    assert life.resumed == Resumed(extent=NOTHING)
    life.tell(Begin(round=1, adopt=True), 0.0)
    for now in range(3):
        assert life.step(now) is None
    life.loop.leave(3.0)
    again = Life(tmp_path, life.memory, 0, drawn)
    assert again.resumed == Resumed(
        extent=EVERYTHING, round=1, batches_done=3, steps=3, tokens=3 * 8 * 32, waits=False, steps_lost=0, since_round=1
    )
    assert again.tell(Begin(round=1, adopt=False), 4.0) is None
    ready = again.step(5.0)
    assert ready is not None and (ready.steps, ready.batches_done) == (4, 4), "it goes on towards the same Ready"
    calm = Life(tmp_path / "calm", make_memory(), 0, [])
    calm.tell(Begin(round=1, adopt=True), 0.0)
    while calm.step(0.0) is None:
        pass
    assert np.array_equal(again.memory[1], calm.memory[1])


def test_with_a_longer_period_the_optimizer_is_as_old_and_nothing_is_trained_on_twice(tmp_path: Path) -> None:
    memory = make_memory()
    loop = InnerLoop(replace(make_start(), checkpoints=str(tmp_path), checkpoint_every=2), memory)
    find_ready(loop.handle(Begin(round=1, adopt=True), 0.0))
    for number in (1, 2, 3):
        while find_ready(loop.step(0.0)) is None:
            pass
        apply(memory)
        find_ready(loop.handle(replace(MERGE_ALL, round=number + 1), 0.0))
    again = Life(tmp_path, memory, 12, [])
    assert (again.resumed.extent, again.resumed.batches_done, again.resumed.steps_lost) == (OPTIMIZER, 12, 0)
    assert int(again.loop._strategy.optimizer_tensors()["optimizer.steps"]) == 8, "of the second round"


def test_a_checkpoint_older_than_what_was_contributed_lends_its_optimizer_only(tmp_path: Path) -> None:
    life = Life(tmp_path, make_memory(), 0, [])
    life.tell(Begin(round=1, adopt=True), 0.0)
    while life.step(0.0) is None:
        pass
    again = Life(tmp_path, life.memory, 9, [])
    assert (again.resumed.extent, again.resumed.batches_done, again.resumed.steps_lost) == (OPTIMIZER, 9, 0)
    moments = again.loop._strategy.optimizer_tensors()
    assert int(moments["optimizer.steps"]) == 4


def test_without_the_memory_of_contributions_nothing_is_trained_on_twice(tmp_path: Path) -> None:
    life = Life(tmp_path, make_memory(), 0, [])
    life.tell(Begin(round=1, adopt=True), 0.0)
    while life.step(0.0) is None:
        pass
    work = replace(make_work(), generation=b"n" * 32)
    loop = InnerLoop(replace(make_start(work), checkpoints=str(tmp_path)), life.memory)
    resumed = loop.started().resumed
    assert (resumed.extent, resumed.batches_done, resumed.steps_lost) == (NOTHING, 4, 0)


def test_a_disk_that_takes_no_checkpoint_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, make_memory(), 0, [])

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(CheckpointStore, "save", fail)
    life.tell(Begin(round=1, adopt=True), 0.0)
    ready = None
    while ready is None:
        ready = life.step(0.0)
    assert ready.problem == "the checkpoint at batch 4 was not written: No space left on device"
