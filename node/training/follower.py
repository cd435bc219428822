"""A trainer's process of rank 1 and above: `python -m shoal.node.training.follower SOCKET_FD`, which rank 0 starts.

It has a model, and neither data nor an optimizer, a clock or a word for the daemon: for every step it is given its
examples and rank 0's parameters, and gives back a gradient. So there is nothing in which it could come to differ.

Invariant: the process never outlives rank 0, and enters an exchange only where rank 0 has said that all do.
"""

import os
import socket
import sys
from pathlib import Path

import torch

from shoal.node.training.activations import recompute_blocks
from shoal.node.training.devices import choose_device
from shoal.node.training.gradient_pass import GradientPass
from shoal.node.training.messages import BAD_INPUT, OUT_OF_MEMORY, TASK_FAILED, trim_detail
from shoal.node.training.micro_batches import is_out_of_memory
from shoal.node.training.parent_watch import end_with_parent
from shoal.node.training.rank_group import RankGroup
from shoal.node.training.rank_line import Compute, Done, Drop, Faulted, Follow, Join, RankLine, Reduce
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tasks import TakesWeights, make_task
from shoal.protocol.errors import InputError


class Follower:
    """Raises what `tell_fault` knows where the model cannot be made."""

    def __init__(self, follow: Follow) -> None:
        start = follow.start
        self._follow = follow
        self._device = choose_device(start.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(follow.rank)
        # Other masks for other examples, where the task draws any.
        torch.manual_seed(torch.initial_seed() + follow.rank)
        self._task = make_task(start.work.task, start.allow_tasks)
        with blame(type(self._task).__module__, is_out_of_memory):
            if isinstance(self._task, TakesWeights):
                self._task.take_weights(Path(start.weights) if start.weights else None, self._device)
            model = self._task.build_model().to(self._device)
        if start.checkpoint_activations:
            recompute_blocks(model, start.work.task.kind)
        self._pass = GradientPass(self._task, model, self._device, compiles=start.compiled is not None)
        self._group = RankGroup(model)

    def join(self) -> None:
        start = self._follow.start
        assert start.rendezvous is not None, "rank 0 has made it"
        self._group.join(Path(start.rendezvous), self._follow.rank, self._follow.count, start.rank_timeout_s)

    def compute(self, line: RankLine, head: Compute) -> None:
        """One step's part. The exchanges raise RuntimeError, and that ends the process: rank 0 says why."""
        examples = torch.from_numpy(line.receive_examples(head))
        line.send(Done())
        self._group.share_parameters()
        loss = torch.zeros((), device=self._device)
        answer: Done | Faulted
        try:
            if len(examples):
                with blame(type(self._task).__module__, is_out_of_memory):
                    loss = self._pass.run(examples, head.whole, head.size, self._group)
            answer = Done(problem=self._pass.take_problem())
        except (RuntimeError, MemoryError, TaskFault, InputError) as error:
            answer = tell_fault(error)
        line.send(answer)
        match line.receive():
            case Reduce():
                self._group.add_up(loss)
            case Drop():
                pass
            case other:
                raise AssertionError(f"{type(other).__name__} is not what follows Compute")
        self._group.drop()
        if isinstance(answer, Faulted) and self._device.type == "cuda":
            torch.cuda.empty_cache()


def tell_fault(error: Exception) -> Faulted:
    """What rank 0 is told of an error; what is no fault of the input, the task or the memory is raised again."""
    if isinstance(error, InputError):
        return Faulted(reason=BAD_INPUT, detail=trim_detail(str(error)))
    if isinstance(error, TaskFault):
        return Faulted(reason=TASK_FAILED, detail=trim_detail(str(error)))
    if is_out_of_memory(error):
        return Faulted(reason=OUT_OF_MEMORY, detail=trim_detail(str(error)))
    raise error


def serve(line: RankLine) -> None:
    """Follow until rank 0 hangs up; raises OSError then."""
    follow = line.receive()
    assert isinstance(follow, Follow), "the first frame"
    threads = follow.start.threads or torch.get_num_threads()
    torch.set_num_threads(max(1, threads // follow.count))
    try:
        follower = Follower(follow)
    except (RuntimeError, MemoryError, TaskFault, InputError) as error:
        line.send(tell_fault(error))
        line.receive()  # rank 0 hangs up
        return
    line.send(Done())
    while True:
        match line.receive():
            case Join():
                follower.join()
                line.send(Done())
            case Compute() as head:
                follower.compute(line, head)
            case other:
                raise AssertionError(f"{type(other).__name__} is not for a rank that waits")


def main(arguments: list[str]) -> None:
    """Exits with 0 when rank 0 is gone or has hung up, with 1 after an error, which is on standard error."""
    connection = socket.socket(fileno=int(arguments[0]))
    end_with_parent(connection.fileno())
    try:
        serve(RankLine(connection))
    except OSError:
        pass  # rank 0 is gone
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
