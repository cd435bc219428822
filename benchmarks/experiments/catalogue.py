"""The experiments: what each asks, and its arms. The first arm of each is what the others are compared with.

All share one model, one inner optimizer and one number of inner steps a worker, so that arms with equal workers see
equal tokens. Nothing is tuned for an arm but what its name says.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from benchmarks.experiments.arms import Arm
from benchmarks.experiments.texts import MIXED, PACKAGE
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import Draft, Outer, Rounds, Task, Training

WORKERS = 8
INNER_STEPS = 16
# What the number of rounds is a multiple of: rounds of 64 steps, and schedules of eight stages, come out even.
ROUNDS_UNIT = 8

# 99 k parameters in seven parts.
DRAFT = Draft(
    name="experiment",
    task=Task(kind="byte_gpt", options=json.dumps({"layers": 1, "heads": 2, "width": 72, "context": 64})),
    training=Training(inner_steps=INNER_STEPS, steps_min=1, batch_size=4, learning_rate=6e-3, warmup_steps=32),
    outer=Outer(optimizer="nesterov", learning_rate=0.7, momentum=0.8),
    rounds=Rounds(codec="fp32", part_elements=1 << 14),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """`make` gives the arms for a number of rounds of INNER_STEPS steps."""

    question: str
    make: Callable[[int], tuple[Arm, ...]]


def make_arms(name: str, rounds: int, only: tuple[str, ...] = ()) -> tuple[Arm, ...]:
    """The arms of an experiment, or those named by `only`; raises ConfigError."""
    if rounds < ROUNDS_UNIT or rounds % ROUNDS_UNIT:
        raise ConfigError("--rounds", f"is {rounds}", f"use a multiple of {ROUNDS_UNIT}")
    arms = EXPERIMENTS[name].make(rounds)
    known = [arm.name for arm in arms]
    if unknown := [one for one in only if one not in known]:
        raise ConfigError("--only", f"{unknown[0]!r} is no arm of {name}", f"use some of: {'; '.join(known)}")
    return tuple(arm for arm in arms if not only or arm.name in only)


def _make_diloco(rounds: int) -> tuple[Arm, ...]:
    return (
        Arm(name=f"synchronous, {WORKERS}x batch", draft=DRAFT, workers=(WORKERS,) * rounds, synchronous=True),
        Arm(name="one worker, equal steps", draft=DRAFT, workers=(1,) * rounds, synchronous=True),
        Arm(name="one worker, equal tokens", draft=DRAFT, workers=(1,) * (rounds * WORKERS), synchronous=True),
        *(
            Arm(
                name=f"DiLoCo, H = {steps}",
                draft=_with_steps(steps),
                workers=(WORKERS,) * (rounds * INNER_STEPS // steps),
            )
            for steps in (1, 16, 64)
        ),
    )


def _make_codecs(rounds: int) -> tuple[Arm, ...]:
    everybody = (WORKERS,) * rounds
    plain = Outer(optimizer="sgd", learning_rate=1.0)
    settings = (("int8", DRAFT.outer), ("int4", DRAFT.outer), ("topk2", DRAFT.outer), ("topk2", plain))
    arms = [Arm(name="fp32", draft=DRAFT, workers=everybody)]
    for codec, outer in settings:
        draft = replace(DRAFT, outer=outer, rounds=replace(DRAFT.rounds, codec=codec, update_codec="int8"))
        name = codec if outer is DRAFT.outer else f"{codec}, outer sgd 1.0"
        arms.append(Arm(name=name, draft=draft, workers=everybody))
        forgetful = replace(draft, rounds=replace(draft.rounds, residual_kept=0.0))
        arms.append(Arm(name=f"{name}, no feedback", draft=forgetful, workers=everybody))
    arms.append(Arm(name="fp32, outer sgd 1.0", draft=replace(DRAFT, outer=plain), workers=everybody))
    return tuple(arms)


def _make_dropped(rounds: int) -> tuple[Arm, ...]:
    return tuple(
        Arm(name=f"{share:.0%} lost", draft=DRAFT, workers=(WORKERS,) * rounds, lost_share=share)
        for share in (0.0, 0.1, 0.3, 0.5)
    )


def _make_joining(rounds: int) -> tuple[Arm, ...]:
    half, stage = rounds // 2, rounds // WORKERS
    ramp = tuple(count for count in range(1, WORKERS + 1) for _ in range(stage))
    schedules = {
        "constant distributed": (WORKERS,) * rounds,
        "constant local": (1,) * rounds,
        "doubling": (WORKERS // 2,) * half + (WORKERS,) * half,
        "halving": (WORKERS,) * half + (WORKERS // 2,) * half,
        "ramp up": ramp,
        "ramp down": ramp[::-1],
    }
    return tuple(Arm(name=name, draft=DRAFT, workers=workers) for name, workers in schedules.items())


def _make_shards(rounds: int) -> tuple[Arm, ...]:
    return tuple(
        Arm(
            name=f"{name}, H = {steps}",
            draft=_with_steps(steps),
            workers=(WORKERS,) * (rounds * INNER_STEPS // steps),
            texts=texts,
        )
        for steps in (16, 64)
        for name, texts in (("all packages", MIXED), ("a package each", PACKAGE))
    )


def _make_outer(rounds: int) -> tuple[Arm, ...]:
    # The draft's own setting first, as what the others are compared with.
    grid = sorted(
        ((rate, momentum) for rate in (0.4, 0.7, 1.0) for momentum in (0.5, 0.8, 0.9)),
        key=lambda one: one != (DRAFT.outer.learning_rate, DRAFT.outer.momentum),
    )
    return tuple(
        Arm(
            name=f"rate {rate}, momentum {momentum}",
            draft=replace(DRAFT, outer=Outer(learning_rate=rate, momentum=momentum)),
            workers=(WORKERS,) * rounds,
        )
        for rate, momentum in grid
    )


def _with_steps(inner_steps: int) -> Draft:
    return replace(DRAFT, training=replace(DRAFT.training, inner_steps=inner_steps))


EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "diloco": Experiment(
            question="DiLoCo against synchronous training and one worker (arXiv 2311.08105, table 2)",
            make=_make_diloco,
        ),
        "codecs": Experiment(question="What a codec of contributions costs, updates in int8", make=_make_codecs),
        "dropped": Experiment(
            question="Contributions lost at random in every round (arXiv 2311.08105, figure 8)", make=_make_dropped
        ),
        "joining": Experiment(
            question="Workers that join and leave over time (arXiv 2311.08105, adaptive compute pool)",
            make=_make_joining,
        ),
        "shards": Experiment(
            question="A package of the library for each worker, against all of them for all", make=_make_shards
        ),
        "outer": Experiment(question="Learning rate and momentum of the outer step", make=_make_outer),
    }
)
