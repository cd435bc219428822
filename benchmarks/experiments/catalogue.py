"""The experiments: what each asks, and its arms. The first arm of each is what the others are compared with.

All share one model, one inner optimizer and one number of inner steps a worker, so that arms with equal workers see
equal tokens; in `speeds` they have equal simulated time instead. Nothing is tuned for an arm but what its name says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.experiments import churn
from benchmarks.experiments.arms import Arm, run_arm
from benchmarks.experiments.islands import APART, AVERAGED, CONTRIBUTED, EACH, ENSEMBLE, MEAN, NOLOCO, POSTERIOR
from benchmarks.experiments.report import draw_churn, draw_plot, format_churn, format_table, format_times
from benchmarks.experiments.swarm import BY_GROWTH, BY_RATIO
from benchmarks.experiments.texts import MIXED, PACKAGE
from shoal.protocol.attendance import PARTICIPATION, WORK
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import DELAYED, EAGER, INNER_OPTIMIZERS, OVERLAPPED, Draft, Outer, Rounds, Task, Training

WORKERS = 8
INNER_STEPS = 16
# What the number of rounds is a multiple of: rounds of 64 steps, and schedules of eight stages, come out even.
ROUNDS_UNIT = 8
# For three optimizers at three rates each there is time for half of the workers.
WORKERS_INNER = 4
RATES_INNER = (6e-3, 12e-3, 24e-3)  # the draft's own first
RATES_ADAM = (0.01, 0.03, 0.1)  # of the outer step
SPEEDS = (1.0, 1.0, 2.0, 2.0, 4.0, 4.0)  # steps a second
PATIENT_S = 60.0  # longer than the slowest of them takes

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
    """`make` gives the arms for a number of rounds of INNER_STEPS steps; `run` takes one of them and a seed, and the
    other two show what came of all."""

    question: str
    make: Callable[[int], tuple[Any, ...]]
    run: Callable[[Any, int], Any] = run_arm
    format: Callable[[Sequence[Any], Sequence[Any]], str] = format_table
    draw: Callable[[Path, str, Sequence[Any], Sequence[Any]], bool] = draw_plot


def make_arms(name: str, rounds: int, only: tuple[str, ...] = ()) -> tuple[Any, ...]:
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
    sparse = replace(draft, rounds=replace(draft.rounds, residual_kept=0.95))  # of the last setting, SparseLoCo's
    arms.append(Arm(name="topk2, outer sgd 1.0, 0.95 kept", draft=sparse, workers=everybody))
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
    choices = (
        ("all packages", MIXED, False),
        ("all packages, divided", MIXED, True),
        ("a package each", PACKAGE, False),
    )
    return tuple(
        Arm(
            name=f"{name}, H = {steps}",
            draft=_with_training(inner_steps=steps, divide_data=divided),
            workers=(WORKERS,) * (rounds * INNER_STEPS // steps),
            texts=texts,
        )
        for steps in (16, 64)
        for name, texts, divided in choices
    )


def _make_outer(rounds: int) -> tuple[Arm, ...]:
    # The draft's own setting first, as what the others are compared with.
    grid = sorted(
        ((rate, momentum) for rate in (0.4, 0.7, 1.0) for momentum in (0.5, 0.8, 0.9)),
        key=lambda one: one != (DRAFT.outer.learning_rate, DRAFT.outer.momentum),
    )
    settings = {
        f"rate {rate}, momentum {momentum}": Outer(learning_rate=rate, momentum=momentum) for rate, momentum in grid
    }
    settings |= {f"adam, rate {rate}": Outer(optimizer="adam", learning_rate=rate, momentum=0.9) for rate in RATES_ADAM}
    return tuple(
        Arm(name=name, draft=replace(DRAFT, outer=outer), workers=(WORKERS,) * rounds)
        for name, outer in settings.items()
    )


def _make_overlapped(rounds: int) -> tuple[Arm, ...]:
    everybody = (WORKERS,) * rounds
    arms = [Arm(name="diloco", draft=DRAFT, workers=everybody)]
    # A manifest has no mixing of 1: with that nobody would ever take anything of the base.
    for steps, mixing in ((1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5), (4, 0.99), (8, 0.0), (8, 0.5)):
        training = replace(DRAFT.training, strategy=OVERLAPPED, overlap_steps=steps, mixing=mixing)
        name = f"{steps} overlapped, mixing {mixing}"
        arms.append(Arm(name=name, draft=replace(DRAFT, training=training), workers=everybody))
    return tuple(arms)


def _make_streaming(rounds: int) -> tuple[Arm, ...]:
    """Each parameter is exchanged every INNER_STEPS steps, by fragments that take turns."""
    arms = [Arm(name="diloco, whole", draft=DRAFT, workers=(WORKERS,) * rounds)]
    for fragments, overlap_steps in ((2, 0), (4, 0), (4, 1), (4, 3)):
        changes = {"strategy": OVERLAPPED, "overlap_steps": overlap_steps, "mixing": 0.5} if overlap_steps else {}
        draft = replace(
            _with_training(inner_steps=INNER_STEPS // fragments, **changes),
            rounds=replace(DRAFT.rounds, fragments=fragments),
        )
        name = f"{fragments} fragments" + (f", {overlap_steps} overlapped" if overlap_steps else "")
        arms.append(Arm(name=name, draft=draft, workers=(WORKERS,) * (rounds * fragments)))
    return tuple(arms)


def _make_delayed(rounds: int) -> tuple[Arm, ...]:
    """What is done beside an exchange stays; the outer step as it is and smaller ones."""
    arms = [Arm(name="diloco", draft=DRAFT, workers=(WORKERS,) * rounds)]
    for strategy, prefix in ((DELAYED, ""), (EAGER, "eager, ")):
        for overlap_steps, rate, momentum in ((4, 0.7, 0.8), (15, 0.7, 0.8), (15, 0.5, 0.5), (15, 0.3, 0.5)):
            training = replace(DRAFT.training, strategy=strategy, overlap_steps=overlap_steps)
            draft = replace(DRAFT, training=training, outer=Outer(learning_rate=rate, momentum=momentum))
            name = f"{prefix}{overlap_steps} steps late, outer {rate}/{momentum}"
            arms.append(Arm(name=name, draft=draft, workers=(WORKERS,) * rounds))
    # What an element moves by in a round at most is about the inner learning rate times the steps: 0.1.
    training = replace(DRAFT.training, strategy=DELAYED, overlap_steps=INNER_STEPS - 1)
    late = f"{INNER_STEPS - 1} steps late"
    for clip in (0.1, 0.03):
        draft = replace(DRAFT, training=training, outer=replace(DRAFT.outer, momentum_clip=clip))
        arms.append(Arm(name=f"{late}, momentum at most {clip}", draft=draft, workers=(WORKERS,) * rounds))
    small = Outer(learning_rate=0.3, momentum=0.5)
    draft = replace(DRAFT, training=training, outer=replace(small, momentum_clip=0.03))
    arms.append(Arm(name=f"{late}, outer 0.3/0.5, momentum at most 0.03", draft=draft, workers=(WORKERS,) * rounds))
    for outer in (DRAFT.outer, small):
        for penalty, clip in ((BY_RATIO, 0.0), (BY_GROWTH, 0.0), (BY_RATIO, 0.03), (BY_GROWTH, 0.03)):
            draft = replace(DRAFT, training=training, outer=replace(outer, momentum_clip=clip))
            name = f"{late}, outer {outer.learning_rate}/{outer.momentum}, by {penalty}"
            name += f", momentum at most {clip}" if clip else ""
            arms.append(Arm(name=name, draft=draft, workers=(WORKERS,) * rounds, gap_penalty=penalty))
    return tuple(arms)


def _make_inner(rounds: int) -> tuple[Arm, ...]:
    return tuple(
        Arm(
            name=f"{optimizer} {rate:g}, H = {steps}",
            draft=_with_training(inner_steps=steps, inner_optimizer=optimizer, learning_rate=rate),
            workers=(WORKERS_INNER,) * (rounds * INNER_STEPS // steps),
        )
        for steps in (16, 64)
        for optimizer in INNER_OPTIMIZERS
        for rate in RATES_INNER
    )


def _make_speeds(rounds: int) -> tuple[Arm, ...]:
    """In the time in which the slowest makes so many rounds of INNER_STEPS steps."""
    settings: tuple[tuple[str, dict[str, Any], float], ...] = (
        (f"{INNER_STEPS} steps, all are waited for", {}, PATIENT_S),
        (f"{INNER_STEPS} steps, grace 2 s", {}, 2.0),
        # The fastest make at most 64 steps in 16 s, so that the number never ends a round.
        ("8 s", {"inner_steps": 1000, "round_time_s": 8.0}, 2.0),
        ("16 s", {"inner_steps": 1000, "round_time_s": 16.0}, 2.0),
    )
    return tuple(
        Arm(
            name=name,
            draft=replace(_with_training(**training), rounds=replace(DRAFT.rounds, grace_s=grace_s)),
            workers=(len(SPEEDS),),
            speeds=SPEEDS,
            until_s=rounds * INNER_STEPS / min(SPEEDS),
        )
        for name, training, grace_s in settings
    )


def _make_seldom(rounds: int) -> tuple[Arm, ...]:
    """A package each. Half of the workers are there in every round, the others in one of four, or all but two; who was
    away for more than a round begins at the base."""
    half, most = ((1.0,) * always + (0.25,) * (WORKERS - always) for always in (WORKERS // 2, 2))
    settings = (
        ("everybody always", WORK, (1.0,) * WORKERS),
        ("half seldom, by work", WORK, half),
        ("half seldom, by participation", PARTICIPATION, half),
        ("half alone, by work", WORK, (1.0,) * (WORKERS // 2) + (0.0,) * (WORKERS // 2)),
        ("most seldom, by work", WORK, most),
        ("most seldom, by participation", PARTICIPATION, most),
    )
    return tuple(
        Arm(
            name=name,
            draft=replace(_with_training(missed_rounds_max=1), rounds=replace(DRAFT.rounds, weights=weights)),
            workers=(WORKERS,) * rounds,
            texts=PACKAGE,
            presence=presence,
        )
        for name, weights, presence in settings
    )


def _make_gossip(rounds: int) -> tuple[Arm, ...]:
    """Pairs that mix, and nobody who does; each worker's model by itself, and the mean of all of them."""
    swarm = Arm(name="diloco", draft=DRAFT, workers=(WORKERS,) * rounds)
    settings = ((NOLOCO, EACH), (NOLOCO, MEAN), (AVERAGED, EACH), (AVERAGED, MEAN), (APART, EACH))
    arms = [replace(swarm, name=f"{mix}, {measure}", mix=mix, measure=measure) for mix, measure in settings]
    for codec in ("int8", "int4"):
        mixed = replace(swarm, draft=replace(DRAFT, rounds=replace(DRAFT.rounds, codec=codec)), mix=CONTRIBUTED)
        arms += [replace(mixed, name=f"contributed, {codec}, {one}", measure=one) for one in (EACH, MEAN)]
    return swarm, *arms


def _make_experts(rounds: int) -> tuple[Arm, ...]:
    """A package each, and everybody apart: what the models are worth alone, as one and together."""
    swarm = Arm(name="diloco, a package each", draft=DRAFT, workers=(WORKERS,) * rounds, texts=PACKAGE)
    apart = tuple(
        replace(swarm, name=f"apart, {measure}", mix=APART, measure=measure)
        for measure in (EACH, MEAN, ENSEMBLE, POSTERIOR)
    )
    mixed = tuple(
        replace(swarm, name=f"apart, all packages, {measure}", mix=APART, measure=measure, texts=MIXED)
        for measure in (EACH, ENSEMBLE)
    )
    return swarm, *apart, *mixed


def _make_asynchronous(rounds: int) -> tuple[Arm, ...]:
    """As `speeds`, with rounds that begin as soon as two peers are ready and it does not pay to wait for more."""
    settings: tuple[tuple[str, float, dict[str, Any], float], ...] = (
        ("grace 2 s", 2.0, {}, 0.0),
        ("grace 0", 0.0, {}, 0.0),
        ("grace 0, momentum every 2", 0.0, {"momentum_every": 2}, 0.0),
        ("grace 0, momentum every 4", 0.0, {"momentum_every": 4}, 0.0),
        ("grace 0, momentum every 2, rate 1.4", 0.0, {"momentum_every": 2, "learning_rate": 1.4}, 0.0),
        ("grace 0, stale work by (1 + s)^-0.5", 0.0, {}, 0.5),
        ("grace 0, stale work by (1 + s)^-1", 0.0, {}, 1.0),
    )
    return tuple(
        Arm(
            name=name,
            draft=replace(
                DRAFT, rounds=replace(DRAFT.rounds, grace_s=grace_s, peers_min=2), outer=replace(DRAFT.outer, **outer)
            ),
            workers=(len(SPEEDS),),
            speeds=SPEEDS,
            until_s=rounds * INNER_STEPS / min(SPEEDS),
            stale_exponent=stale_exponent,
        )
        for name, grace_s, outer, stale_exponent in settings
    )


def _make_churn(rounds: int) -> tuple[churn.ChurnArm, ...]:
    draft = _with_training(inner_steps=1000, round_time_s=churn.ROUND_S)
    sides = (
        ("swarm", None),
        ("synchronous, loses nothing", 0.0),
        ("synchronous, checkpoint every round", churn.ROUND_S),
        ("synchronous, every 4 rounds", 4 * churn.ROUND_S),
    )
    calm = churn.ChurnArm(name="swarm, nobody dies", draft=draft, rounds=rounds, mtbf_rounds=None)
    return calm, *(
        replace(calm, name=f"{name}, {mtbf} rounds", mtbf_rounds=mtbf, checkpoint_s=checkpoint_s)
        for mtbf in (32, 16, 8, 4, 2)
        for name, checkpoint_s in sides
    )


def _with_steps(inner_steps: int) -> Draft:
    return _with_training(inner_steps=inner_steps)


def _with_training(**training: Any) -> Draft:
    return replace(DRAFT, training=replace(DRAFT.training, **training))


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
        "seldom": Experiment(
            question="A package each, half of the workers seldom there: weights by participation (arXiv 2306.03401)",
            make=_make_seldom,
        ),
        "outer": Experiment(question="Learning rate and momentum of the outer step", make=_make_outer),
        "overlapped": Experiment(
            question="Training beside the exchange (arXiv 2501.18512, one fragment)", make=_make_overlapped
        ),
        "streaming": Experiment(
            question="Fragments that take turns (arXiv 2501.18512), each parameter as often as in DiLoCo",
            make=_make_streaming,
        ),
        "delayed": Experiment(
            question="Work beside the exchange that stays (DiLoCoX, arXiv 2506.21263; eager: 2502.12996)",
            make=_make_delayed,
        ),
        "gossip": Experiment(
            question="Pairs that mix their parameters (NoLoCo, arXiv 2506.10911), against rounds", make=_make_gossip
        ),
        "experts": Experiment(
            question="Models that are trained apart on a package each (arXiv 2208.03306), against rounds",
            make=_make_experts,
        ),
        "inner": Experiment(question="Inner optimizers, each at the same three learning rates", make=_make_inner),
        "speeds": Experiment(
            question="Workers of speeds 1:2:4 in simulated time: rounds by steps and rounds by time",
            make=_make_speeds,
            format=format_times,
        ),
        "asynchronous": Experiment(
            question="Rounds that wait for few (arXiv 2401.09135): momentum now and then, stale work at less weight",
            make=_make_asynchronous,
            format=format_times,
        ),
        "churn": Experiment(
            question="Workers that die and come back, in simulated time",
            make=_make_churn,
            run=churn.run_churn,
            format=format_churn,
            draw=draw_churn,
        ),
    }
)
