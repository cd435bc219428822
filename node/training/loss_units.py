"""What the losses of the built-in tasks are in, for whoever shows one and has no torch; an own task says it itself."""

from collections.abc import Mapping
from types import MappingProxyType

from shoal.node.training.causal_lm_config import CAUSAL_LM
from shoal.node.training.gpt_config import KIND

DIGITS = "digits"
NATS = "nats"  # of such a loss there is a perplexity
NATS_A_TOKEN = f"{NATS} a token"  # of a language model
LOSS_UNITS: Mapping[str, str] = MappingProxyType(
    {KIND: NATS_A_TOKEN, CAUSAL_LM: NATS_A_TOKEN, DIGITS: f"{NATS} an image"}
)


def find_loss_unit(kind: str) -> str:
    """Of a task of this kind; empty where only the task's own code knows."""
    return LOSS_UNITS.get(kind, "")


def write_loss(loss: str, unit: str) -> str:
    """A figure with what it is in, where that is known."""
    return f"{loss} {unit}" if unit else loss


def has_perplexity(unit: str) -> bool:
    """Whether e to the loss means something."""
    return unit.partition(" ")[0] == NATS
