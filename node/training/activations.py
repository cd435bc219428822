"""Activations that the backward pass computes again instead of keeping them: which models can do that."""

from torch import nn

from shoal.node.training.model import Gpt
from shoal.protocol.errors import ConfigError


def recompute_blocks(model: nn.Module, kind: str) -> None:
    """Raises ConfigError for a model that does not know how."""
    if not isinstance(model, Gpt):
        fix = "take it out of the configuration, or make trainer.micro_batch smaller"
        raise ConfigError("trainer.checkpoint_activations", f"is for byte_gpt, and the swarm trains {kind}", fix)
    model.recomputes_blocks = True
