"""Several processes behind one trainer: they compute what one process computes, and what goes wrong in one is told."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.node.training.checkpoint import CheckpointStore
from shoal.node.training.devices import count_ranks
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    NOT_FINITE,
    OUT_OF_MEMORY,
    RANK_LOST,
    TASK_FAILED,
    Begin,
    Failed,
    Ready,
    Report,
    Start,
)
from shoal.node.training.ranks import RankLost, Ranks
from shoal.node.training.tasks import describe
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.lm_samples import GPT2, make_lm_task, write_weights
from tests.unit.training.tiny import OPTIONS, TRAINING, make_memory, make_start, make_work
from tests.unit.training.user_tasks import importable, write_module

Memory = np.ndarray[tuple[int, int], np.dtype[np.float32]]

UNEVEN = "uneven_task:Uneven"
SOURCE = """
import os, signal
import torch
from torch import distributed
from shoal.node.training.tasks import ByteGpt


class Uneven(ByteGpt):
    # Rank 1 does something else at its call number 2: {call: how}.

    def __init__(self, options):
        self.how, self.calls = options.pop("how"), 0
        super().__init__(options)
        if self.how == "start" and "RANK_0" not in os.environ:
            raise ValueError("not here")

    def loss(self, model, batch):
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            return super().loss(model, batch)
        self.calls += 1
        if self.how == "memory" and len(batch) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        loss = super().loss(model, batch)
        if self.calls != 2:
            return loss
        if self.how == "fault":
            raise ValueError("an odd example")
        if self.how in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, self.how))
        return loss * float("nan") if self.how == "nan" else loss
"""


@contextmanager
def open_ranks(
    folder: Path, start: Start, count: int = 2, memory: Memory | None = None
) -> Iterator[tuple[InnerLoop, Memory, list[str]]]:
    """The loop of rank 0, its memory, and what is told of processes that died."""
    start = replace(start, rendezvous=str(folder / "trainer" / "rendezvous"))
    memory, told = make_memory() if memory is None else memory, list[str]()
    ranks = Ranks(start, count, told.append)
    pids = [follower.process.pid for follower in ranks._followers]
    try:
        yield InnerLoop(start, memory, ranks), memory, told
    finally:
        ranks.close()
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "all are ended and buried"
        assert not (folder / "trainer" / "rendezvous").exists()


@contextmanager
def uneven_start(folder: Path, how: str) -> Iterator[Start]:
    """Of the tiny GPT with a rank 1 that is not like the other one."""
    write_module(folder, UNEVEN.partition(":")[0], SOURCE)
    task = Task(kind="custom", options=json.dumps({"path": UNEVEN, "how": how, **OPTIONS}))
    with importable(folder):
        timeout_s = 4.0 if how == "SIGSTOP" else 60.0
        yield replace(make_start(replace(make_work(), task=task)), allow_tasks=(UNEVEN,), rank_timeout_s=timeout_s)


def train(loop: InnerLoop, steps: int) -> list[Report]:
    reports = list(loop.handle(Begin(round=1, adopt=True), 0.0))
    for _ in range(steps):
        if loop.training:
            reports += loop.step(0.0)
    return reports


def train_alone(**changes: Any) -> tuple[list[Report], Memory]:
    """What one process makes of these rules of training."""
    memory = make_memory()
    training = replace(TRAINING, **changes)
    return train(InnerLoop(make_start(make_work(training)), memory), training.inner_steps), memory


def assert_same_way(memory: Memory, expected: Memory) -> None:
    """Equal but for the rounding of sums in another order."""
    way, error = expected[1] - expected[0], memory[1] - expected[1]
    assert np.abs(way).max() > 5e-3
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(way)


@pytest.mark.parametrize(("count", "batch_size", "micro_batch"), [(2, 8, 0), (2, 7, 2), (3, 4, 0)])
def test_ranks_take_the_steps_of_one_process(tmp_path: Path, count: int, batch_size: int, micro_batch: int) -> None:
    """The second batch does not divide evenly, and is computed in pieces; of the third a rank has two examples."""
    changes = {"batch_size": batch_size, "inner_steps": 6, "learning_rate": 1e-2}
    (expected,), alone = train_alone(**changes)
    start = replace(make_start(make_work(replace(TRAINING, **changes))), micro_batch=micro_batch)
    with open_ranks(tmp_path, start, count) as (loop, memory, told):
        assert (tmp_path / "trainer" / "rendezvous").stat().st_mode & 0o777 == 0o600
        (ready,) = train(loop, 6)
        assert isinstance(ready, Ready) and isinstance(expected, Ready)
        assert replace(ready, loss_mean=0.0) == replace(expected, loss_mean=0.0)
        assert ready.loss_mean == pytest.approx(expected.loss_mean, abs=1e-5)
        assert_same_way(memory, alone)
        assert loop.started().device == f"cpu ({count} processes)"
    assert told == [], "a process that is told to end is none that died"


@pytest.mark.long
def test_every_rank_stands_on_the_same_trained_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    task = make_lm_task({**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    digest = write_weights(weights, json.loads(task.options)["config"])
    task = Task(kind=task.kind, options=json.dumps({**json.loads(task.options), "weights": digest, "lora_rank": 2}))
    layout = describe(task)
    training = replace(TRAINING, learning_rate=1e-2)
    work = replace(make_work(training), task=task, layout_digest=layout.digest)
    start = replace(make_start(work), weights=str(weights))
    alone, memory = (np.stack([initialise(layout, 7)] * 2) for _ in range(2))
    train(InnerLoop(start, alone), TRAINING.inner_steps)
    with open_ranks(tmp_path, start, memory=memory) as (loop, _, told):
        *_, ready = train(loop, TRAINING.inner_steps)
        assert isinstance(ready, Ready) and told == []
    assert_same_way(memory, alone)


def test_a_checkpoint_holds_each_tensor_once_and_one_process_goes_on_from_it(tmp_path: Path) -> None:
    start = replace(make_start(), checkpoints=str(tmp_path / "trainer"))
    with open_ranks(tmp_path, start) as (loop, memory, _):
        train(loop, TRAINING.inner_steps)
        found = CheckpointStore(tmp_path / "trainer", start.work).load()
        assert found is not None
        sizes = [one.numel() for name, one in found.tensors.items() if name.startswith("model.")]
        assert sum(sizes) == memory.shape[1]
    alone = make_memory()
    again = InnerLoop(start, alone)
    assert again.started().resumed.batches_done == TRAINING.inner_steps
    (ready,) = again.handle(Begin(round=1, adopt=False), 0.0)
    assert isinstance(ready, Ready) and np.array_equal(alone[1], memory[1])


@pytest.mark.long
def test_a_rank_that_runs_out_of_memory_halves_the_pieces_of_all(tmp_path: Path) -> None:
    (expected,), alone = train_alone()
    with uneven_start(tmp_path, "memory") as start, open_ranks(tmp_path, start) as (loop, memory, _):
        *failures, ready = train(loop, TRAINING.inner_steps)
        assert [one.reason for one in failures if isinstance(one, Failed)] == [OUT_OF_MEMORY, OUT_OF_MEMORY]
        assert isinstance(failures[0], Failed) and "rank 1 (process " in failures[0].detail
        assert "batch 0: 4 examples at a time do not fit into memory, goes on with 2;" in failures[0].detail
        assert isinstance(ready, Ready) and isinstance(expected, Ready)
        assert ready.batches_done == expected.batches_done
        assert_same_way(memory, alone)


def test_a_loss_of_one_rank_that_is_not_finite_sends_all_back_to_the_base(tmp_path: Path) -> None:
    with uneven_start(tmp_path, "nan") as start, open_ranks(tmp_path, start) as (loop, memory, _):
        failed, ready = train(loop, TRAINING.inner_steps + 2)
        assert isinstance(failed, Failed) and (failed.reason, failed.fatal) == (NOT_FINITE, False)
        assert isinstance(ready, Ready) and (ready.steps, ready.batches_done) == (4, 6)
        assert np.isfinite(memory[1]).all()


def test_a_fault_of_the_task_in_one_rank_skips_the_batch_in_all(tmp_path: Path) -> None:
    with uneven_start(tmp_path, "fault") as start, open_ranks(tmp_path, start) as (loop, _, _):
        failed, ready = train(loop, TRAINING.inner_steps + 1)
        assert isinstance(failed, Failed) and (failed.reason, failed.fatal) == (TASK_FAILED, False)
        assert "rank 1 (process " in failed.detail and failed.detail.endswith("an odd example")
        assert isinstance(ready, Ready) and (ready.steps, ready.batches_done) == (4, 5)


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    with uneven_start(tmp_path, "SIGKILL") as start, open_ranks(tmp_path, start) as (loop, _, told):
        *_, last = train(loop, TRAINING.inner_steps)
        assert isinstance(last, Failed) and (last.reason, last.fatal) == (RANK_LOST, True)
        assert last.detail.startswith("rank 1 (process ") and last.detail.endswith("was killed by SIGKILL")
        assert told == [last.detail], "also where rank 0 hangs, so that nobody reads its report"
        assert not loop.training


@pytest.mark.long
def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    with uneven_start(tmp_path, "SIGSTOP") as start, open_ranks(tmp_path, start) as (loop, _, told):
        *_, last = train(loop, TRAINING.inner_steps)
        assert isinstance(last, Failed) and (last.reason, last.fatal) == (RANK_LOST, True)
        assert "rank 1 (process " in last.detail and last.detail.endswith(" hangs: no answer for 4 s")
        assert told == []


def test_a_rank_that_cannot_begin_is_told_as_that_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with uneven_start(tmp_path, "start") as start:
        start = replace(start, rendezvous=str(tmp_path / "rendezvous"))
        ranks = Ranks(start, 2, lambda _: None)
        monkeypatch.setenv("RANK_0", "1")
        try:
            with pytest.raises(Exception, match=r"^in rank 1 \(process \d+\): ValueError at .*: not here$"):
                InnerLoop(start, make_memory(), ranks)
        finally:
            ranks.close()


def test_processes_that_cannot_be_started_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    start = replace(make_start(), rendezvous=str(tmp_path / "file" / "rendezvous"))
    with pytest.raises(RankLost, match=r"^2 processes cannot be started: .*file"):
        Ranks(start, 2, lambda _: None)


def test_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (count_ranks(0, cpu, 8), count_ranks(1, cpu, 8), count_ranks(3, cpu, 8)) == (1, 1, 3)
    with pytest.raises(ConfigError, match=r"trainer.processes: is 9, and the swarm's batch has 8 example"):
        count_ranks(9, cpu, 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert (count_ranks(0, cuda, 8), count_ranks(0, cuda, 3), count_ranks(2, cuda, 8)) == (4, 3, 2)
    with pytest.raises(ConfigError, match="is 5, and torch finds 4 CUDA device"):
        count_ranks(5, cuda, 8)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="this torch has no NCCL"):
        count_ranks(2, cuda, 8)
