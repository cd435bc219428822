"""What test_divided_model.py runs in two processes: the loop of an attached script with a model that FSDP2 has divided
between them, and in rank 0 the same with a whole one. Prints one line a rank."""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shoal.node.training.attached_loop import AttachedLoop
from shoal.node.training.divided_model import DividedRanks, WholeParameters
from shoal.node.training.local_parameters import LocalParameters
from shoal.node.training.messages import Begin, Command, Evaluate, Evaluated, Failed, Merge, Ready, Report, Work
from shoal.node.training.script_ranks import Word
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Task, Training

PART_ELEMENTS = 16  # the parts end in the middle of parameters, and of what a rank holds of them
RULES = Training(strategy="delayed", inner_steps=3, steps_min=1, overlap_steps=2, round_time_s=1000.0)


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def evaluate(model: nn.Module) -> tuple[float, int]:
    x = torch.linspace(-1.0, 1.0, 12).view(4, 3)
    return model(x).square().mean().item(), len(x)


class Side:
    """A model, its loop, and the memory that it shares with a daemon."""

    def __init__(self, model: nn.Module, make: Callable[[torch.optim.Optimizer], AttachedLoop]) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.loop = make(self.optimizer)

    def begin(self, elements: int) -> None:
        self.memory = np.zeros((2, elements), np.float32)
        work = Work(
            task=Task(kind="attached", options="{}"),
            training=RULES,
            layout_digest=bytes(32),
            seed=1,
            peer=PeerId(bytes(32)),
            generation=bytes(32),
            batches_done=0,
        )
        self.loop.start(work, self.memory, "cpu")

    def train(self, number: int) -> float:
        """A step that is the same in every process, whose mean is that of each of them."""
        x = torch.cos(torch.arange(6.0).view(2, 3) * (number + 1))
        loss: Tensor = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def make_base(elements: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(number).standard_normal(elements).astype(np.float32)


def main(rank: int) -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    divided_model = build()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(divided_model[0], mesh=mesh)
    fully_shard(divided_model, mesh=mesh)
    ranks = DividedRanks(divided_model, evaluate)
    parameters = WholeParameters(ranks) if ranks.is_first else LocalParameters(divided_model)
    divided = Side(divided_model, lambda optimizer: AttachedLoop(parameters, optimizer, ranks.evaluation))
    alone = build()
    whole = Side(alone, lambda optimizer: AttachedLoop(LocalParameters(alone), optimizer, evaluate))
    elements = sum(one.numel() for one in alone.parameters())
    seen: list[str] = []

    def both(act: Callable[[Side], list[Report]]) -> None:
        """The same to both sides, in rank 0; the others do what it asks for meanwhile."""
        if ranks.is_first:
            reports = act(divided), act(whole)
            seen.extend(type(one).__name__ for one in reports[0])
            for one, other in zip(*reports, strict=True):
                if isinstance(one, Evaluated) and isinstance(other, Evaluated):
                    assert (one.loss_nats, one.tokens) == (other.loss_nats, 2 * other.tokens), (one, other)
                elif isinstance(one, Ready | Failed):
                    assert one == other, (one, other)
            assert divided.memory.tobytes() == whole.memory.tobytes(), "what is handed over"
            word = Word(replaced=divided.loop.take_replaced(), cleared=divided.loop.take_cleared())
            assert word.replaced == whole.loop.take_replaced()
            ranks.say(word)
        else:
            word = ranks.hear()
            while word.errand:
                ranks.do(word.errand)
                word = ranks.hear()
        if word.replaced:
            ranks.share_parameters()
        ranks.gather()
        if ranks.is_first:
            for one, other in zip(ranks.whole, alone.parameters(), strict=True):
                assert torch.equal(one, other), "the parameters"
                one.detach().fill_(torch.nan)  # nobody believes what was gathered before

    def command(given: Command, base: int | None = None) -> None:
        def act(side: Side) -> list[Report]:
            if base is not None:
                side.memory[0] = make_base(elements, base)
            return list(side.loop.handle(given, 0.0))

        both(act)

    def catch_up(first: Command, second: Merge) -> None:
        """Two commands before a word of rank 0, so that the second finds what is not divided yet."""

        def act(side: Side) -> list[Report]:
            reports: list[Report] = []
            for number, one in enumerate((first, second)):
                side.memory[0] = make_base(elements, 10 + number)
                reports += side.loop.handle(one, 0.0)
            return reports

        both(act)

    def write_move(last: float = 0.125) -> None:
        """What two peers that have met are moved by; the last element by so much."""
        if ranks.is_first:
            for side in (divided, whole):
                side.memory[1] = make_base(elements, 20)
                side.memory[1, -1] = last

    def step(number: int, bad: bool = False) -> None:
        loss = divided.train(number)
        if ranks.is_first:
            assert loss == whole.train(number)
        both(lambda side: list(side.loop.step(float("nan") if bad else loss, 1, 0.0)))

    def merge(number: int, included: int, adopt_all: bool = False) -> Merge:
        return Merge(
            round=number,
            included=bytes([included]),
            part_elements=PART_ELEMENTS,
            adopt_all=adopt_all,
            place=0,
            places=1,
            begin=True,
        )

    if ranks.is_first:
        divided.begin(elements)
        whole.begin(elements)
    command(Begin(round=1, adopt=True), base=1)
    for number in range(5):  # three are handed over, two are made beside the exchange
        step(number)
    command(merge(2, 0b01), base=2)
    command(Evaluate())
    step(5)
    step(6, bad=True)
    for number in range(7, 10):
        step(number)
    command(merge(3, 0b11), base=3)
    step(10)
    command(merge(4, 0, adopt_all=True), base=4)
    command(Evaluate())
    step(11)
    catch_up(merge(5, 0, adopt_all=True), merge(6, 0b01))
    for number in range(12, 17):
        step(number)
    write_move()
    command(Begin(round=7, adopt=False, shift=True))
    for number in range(17, 20):
        step(number)
    write_move()
    catch_up(Begin(round=8, adopt=False, shift=True), merge(9, 0b01))
    for number in range(20, 23):
        step(number)
    write_move(float("nan"))
    command(Begin(round=10, adopt=False, shift=True))
    print(f"rank {rank}: {' '.join(seen)}", flush=True)
    distributed.barrier()


if __name__ == "__main__":
    own = int(sys.argv[1])
    kept = distributed.FileStore(sys.argv[2], 2)
    distributed.init_process_group("gloo", store=kept, rank=own, world_size=2)
    main(own)
    # FSDP2 keeps the group and with it gloo's threads, whatever is destroyed; one that wants the interpreter's lock
    # while Python 3.11 is taken down ends the process by abort().
    os._exit(0)
