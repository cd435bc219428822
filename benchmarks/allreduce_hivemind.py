"""hivemind's side of benchmarks.allreduce: runs in a venv of its own and prints one line of JSON. None of our packages.

    python allreduce_hivemind.py PEERS ELEMENTS STEPS

Every peer is a DHT node and an averager, each of which hivemind runs in processes of its own.
"""

import json
import sys
import time
from typing import Any

import hivemind
import torch
from hivemind.compression import Uniform8BitQuantization

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MATCHMAKING_S = 2.0
STEP_TIMEOUT_S = 300.0
RMS_ERROR_MAX = 0.1  # what it falls back to where its codec fails is an average of nobody, off by 0.5 and more


def main() -> None:
    peers, elements, steps = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    nodes: list[Any] = []  # hivemind's classes are unknown where it is not installed
    for _ in range(peers):
        known = [str(address) for node in nodes[:1] for address in node.get_visible_maddrs()]
        nodes.append(hivemind.DHT(initial_peers=known, host_maddrs=[LOOPBACK], start=True))
    values = [torch.randn(elements, generator=torch.Generator().manual_seed(number)) for number in range(peers)]
    mean = torch.stack(values).mean(0)
    averagers = [
        hivemind.averaging.DecentralizedAverager(
            [own],
            node,
            prefix="bench",
            target_group_size=peers,
            min_group_size=peers,
            min_matchmaking_time=MATCHMAKING_S,
            request_timeout=1.0,
            compression=Uniform8BitQuantization(),
            start=True,
        )
        for own, node in zip(values, nodes, strict=True)
    ]
    spans = []
    for _ in range(steps):
        began_s = time.perf_counter()
        running = [averager.step(wait=False, timeout=STEP_TIMEOUT_S) for averager in averagers]
        for one in running:
            group = one.result()
            assert group is not None and len(group) == peers, f"a step with {group}"
        spans.append(time.perf_counter() - began_s)
        time.sleep(0.5)
    with averagers[0].get_tensors() as (average,):
        rms_error = float((average - mean).square().mean().sqrt())
    assert rms_error < RMS_ERROR_MAX, f"an average with an error of {rms_error}"
    for one in (*averagers, *nodes):
        one.shutdown()
    print(json.dumps({"steps_s": spans, "rms_error": rms_error}))


if __name__ == "__main__":
    main()
