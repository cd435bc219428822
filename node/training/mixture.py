"""Exported models on a text: what each is worth alone, and what they are worth together, as experts.

Together each model weighs as much as what came before in the window speaks for it: its posterior, with equal priors, so
that nothing has to be trained to choose between them (Li et al., "Branch-Train-Merge", arXiv 2208.03306, section 2.2).
The models may differ in size, and must agree on what a token is.

Invariants: a file is read as safetensors and nothing of it is run; a text longer than about TEXT_BYTES_MAX is cut off,
and windows are spread evenly over what is there.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shoal.node.training.datasets_library import choose_hub_access
from shoal.node.training.documents import TextFiles, list_files
from shoal.node.training.gpt_config import SAMPLE_TEMPERATURE
from shoal.node.training.shards import PIECES_AT_A_TIME
from shoal.node.training.tasks import PredictsTokens, TakesWeights, make_task
from shoal.node.training.tokenizer import ByteTokenizer, Tokenizer
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Task

EXPERTS_MAX = 64
TEXT_BYTES_MAX = 1 << 26
WINDOWS_AT_A_TIME = 16
MODEL, TEXT = "MODEL", "--text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Losses in nats a token: `alone` of each model, `together` of all of them. `shares` is how much each weighed, in
    the mean over all places, and `tokens` how many places there are."""

    alone: tuple[float, ...]
    together: float
    shares: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    path: Path
    task: PredictsTokens
    model: nn.Module


class Mixture:
    """Some exported models that predict the same tokens."""

    def __init__(self, paths: Sequence[Path], tokenizer: Path | None = None, weights: Path | None = None) -> None:
        """`tokenizer` and `weights` are the swarms', as in `[trainer]`. Raises InputError naming the file."""
        if not 1 <= len(paths) <= EXPERTS_MAX:
            raise ConfigError(MODEL, f"stands for {len(paths)} files", f"name 1 to {EXPERTS_MAX}")
        choose_hub_access(None)
        self.experts = [open_expert(path, weights) for path in paths]
        first = self.experts[0]
        for other in self.experts[1:]:
            if other.task.tokens != first.task.tokens:
                problem = f"{other.path} and {first.path} do not predict the same tokens"
                raise ConfigError(MODEL, problem, "name exports of swarms with one tokenizer and vocabulary")
        self.context = min(one.task.context for one in self.experts)
        self.tokenizer: Tokenizer = first.task.open_tokenizer(tokenizer)

    @torch.no_grad()
    def measure(self, windows: NDArray[np.int64], tell: Callable[[str], None]) -> Measured:
        """`windows` is int64 (N, at most context + 1)."""
        alone, shares = (torch.zeros(len(self.experts), dtype=torch.float64) for _ in range(2))
        together, seen = 0.0, 0
        for begin in range(0, len(windows), WINDOWS_AT_A_TIME):
            tell(f"{begin} of {len(windows)} windows")
            piece = torch.from_numpy(windows[begin : begin + WINDOWS_AT_A_TIME])
            likely = torch.stack([_log_likelihood(one, piece) for one in self.experts])  # (E, B, T)
            weights = (likely.cumsum(-1) - likely).log_softmax(0)
            together -= float((weights + likely).logsumexp(0).double().sum())
            alone -= likely.double().sum((1, 2))
            shares += weights.exp().double().sum((1, 2))
            seen += piece[:, 1:].numel()
        return Measured(
            alone=tuple((alone / seen).tolist()),
            together=together / seen,
            shares=tuple((shares / seen).tolist()),
            tokens=seen,
        )

    @torch.no_grad()
    def sample(self, prompt: str, tokens: int) -> bytes:
        """What they write together after the prompt; the same for the same models."""
        generator = torch.Generator().manual_seed(0)
        (ids,) = self.tokenizer.encode([prompt or "\n"])
        first = len(ids)
        for _ in range(tokens):
            window = torch.tensor([ids[-self.context :]])  # (1, T)
            logits = torch.stack([one.task.logits(one.model, window)[0].float() for one in self.experts])  # (E, T, V)
            logits = logits[..., : self.tokenizer.size]
            likely = logits[:, :-1].log_softmax(-1).gather(2, window[0, 1:].expand(len(logits), -1)[..., None])
            weights = likely.sum((1, 2)).softmax(0)  # (E,)
            chances = weights @ (logits[:, -1] / SAMPLE_TEMPERATURE).softmax(-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        return self.tokenizer.decode(ids[first:])


def open_expert(path: Path, weights: Path | None = None) -> Expert:
    """The model in a file that `shoal export` wrote, on the trained weights that its swarm started from, if it did.
    Raises InputError."""
    fix = "name a file that `shoal export` wrote"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise ConfigError(MODEL, f"{path} is not there", fix) from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(MODEL, f"{path} cannot be read: {error}"[:400], fix) from error
    if "task" not in about or "task_options" not in about:
        raise ConfigError(MODEL, f"{path} does not say what task it is of", fix)
    try:
        task = make_task(Task(kind=about["task"], options=about["task_options"]), ())
        if not isinstance(task, PredictsTokens):
            raise ManifestError("task.kind", f"{about['task']} predicts no tokens", "name exports of language models")
        layout = task.layout()
        if isinstance(task, TakesWeights):
            task.take_weights(weights, torch.device("cpu"))
        model = task.build_model()
    except (ManifestError, ValueError) as error:
        raise ConfigError(MODEL, f"{path}: {error}"[:400], fix) from error
    _load(path, model, layout, tensors)
    return Expert(path=path, task=task, model=model.requires_grad_(False).eval())


def read_windows(path: Path, tokenizer: Tokenizer, context: int, windows: int) -> NDArray[np.int64]:
    """At most so many windows of context + 1 tokens, spread evenly over the text: int64 (N, context + 1). Raises
    ConfigError."""
    ids = _read_tokens(path, tokenizer)
    if len(ids) <= context:
        raise ConfigError(TEXT, f"{path} has {len(ids)} tokens", f"give it more than {context}")
    starts = np.linspace(0, len(ids) - context - 1, min(windows, math.ceil(len(ids) / context))).astype(np.int64)
    found: NDArray[np.int64] = ids[starts[:, None] + np.arange(context + 1)]
    return found


def _read_tokens(path: Path, tokenizer: Tokenizer) -> NDArray[np.int64]:
    files, room = TextFiles(), TEXT_BYTES_MAX
    found: list[NDArray[np.int64]] = []
    try:
        listed = list(list_files(path))
        for file in listed:
            if tokenizer.digest == ByteTokenizer.digest:  # as they are: not every file is UTF-8
                found.append(np.frombuffer(files.read(file, room), np.uint8).astype(np.int64))
                room -= len(found[-1])
                continue
            pieces = (piece for piece, _ in files.pieces(file))
            while room > 0 and (group := list(islice(pieces, PIECES_AT_A_TIME))):
                room -= sum(map(len, group))
                found += [np.array(ids, np.int64) for ids in tokenizer.encode(group)]
    except OSError as error:
        raise ConfigError(TEXT, f"{path} cannot be read: {error.strerror or error}", "name a text") from error
    except ConfigError as error:
        raise ConfigError(TEXT, error.problem, error.fix) from error
    return np.concatenate(found) if found else np.zeros(0, np.int64)


@torch.no_grad()
def _load(path: Path, model: nn.Module, layout: Layout, tensors: dict[str, Tensor]) -> None:
    for spec, parameter in zip(layout.tensors, model.parameters(), strict=True):
        given = tensors.get(spec.name)
        if given is None or tuple(given.shape) != spec.shape:
            told = "is missing" if given is None else f"has the shape {tuple(given.shape)} and not {spec.shape}"
            raise ConfigError(MODEL, f"{path}: {spec.name} {told}", "name a file that `shoal export` wrote")
        parameter.copy_(given)


def _log_likelihood(expert: Expert, windows: Tensor) -> Tensor:
    """Of what came, float32 (B, T)."""
    logits = expert.task.logits(expert.model, windows[:, :-1]).float()
    return -F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


def describe(mixture: Mixture, measured: Measured) -> list[str]:
    """A table for people: a line for each model, and one for all."""
    names = [str(one.path) for one in mixture.experts]
    width = max(len(name) for name in [*names, "together"])
    lines = [f"{'model':{width}}  nats a token  perplexity  weight"]
    for name, loss, share in zip(names, measured.alone, measured.shares, strict=True):
        lines.append(f"{name:{width}}  {loss:12.4f}  {math.exp(min(loss, 700)):10.2f}  {share:6.1%}")
    if len(names) > 1:
        lines.append(f"{'together':{width}}  {measured.together:12.4f}  {math.exp(min(measured.together, 700)):10.2f}")
    return lines


def encode_json(mixture: Mixture, measured: Measured) -> str:
    """The same for programs."""
    models = [
        {"model": str(one.path), "loss_nats": loss, "weight": share}
        for one, loss, share in zip(mixture.experts, measured.alone, measured.shares, strict=True)
    ]
    return json.dumps({"models": models, "together_nats": measured.together, "tokens": measured.tokens}, indent=1)
