"""A byte-level GPT, small enough to read in one sitting.

What is special about it: the vocabulary is the 256 bytes; rotary positions instead of learned ones; RMSNorm without
gains, also on queries and keys; ReLU squared in the MLP; untied embedding and head; no biases. Every parameter is
therefore a matrix. Residual projections and the head start at zero, so that the untrained model predicts all bytes
alike (ln 256 = 5.55 nats) and its blocks start as the identity.

The transformers library knows the same function as NanoChat (node/hf_folder.py maps the tensors); whoever changes the
architecture here changes or gives up that mapping.

Shapes: B sequences, T positions, C width, N heads, D = C / N head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from shoal.node.training.gpt_config import MLP_RATIO, ROTARY_PERIOD, VOCABULARY, GptConfig
from shoal.node.training.parameters import Shape, list_specs, start_uniform
from shoal.protocol.layout import UNIFORM, ZEROS, TensorSpec


class Gpt(nn.Module):
    """Logits of the next byte. The parameters hold nothing until loaded; `tensor_specs` says how they start. With
    `recomputes_blocks` the backward pass computes each block once more from its input, and nothing else of it is kept
    until then."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_blocks = False
        self.embedding = Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Linear(config.width, VOCABULARY)

    def forward(self, inputs: Tensor) -> Tensor:
        """Byte values, int64 (B, T), to logits, (B, T, 256)."""
        rotary = rotary_table(inputs.shape[1], self.config.width // self.config.heads, inputs.device)
        x = norm(self.embedding(inputs))  # (B, T, C)
        for block in self.blocks:
            if self.recomputes_blocks and torch.is_grad_enabled():
                # A block draws no random numbers, so that no state of a generator need be kept.
                x = recompute(block, x, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary)
        logits: Tensor = self.head(norm(x))  # (B, T, 256)
        return logits


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_in = Linear(config.width, 3 * config.width)
        self.attention_out = Linear(config.width, config.width)
        self.mlp_in = Linear(config.width, MLP_RATIO * config.width)
        self.mlp_out = Linear(MLP_RATIO * config.width, config.width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attend(norm(x), rotary)
        hidden = F.relu(self.mlp_in(norm(x))).square()  # (B, T, 4C)
        out: Tensor = x + self.mlp_out(hidden)
        return out

    def attend(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, positions, width = x.shape
        qkv = self.attention_in(x).view(batch, positions, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 times (B, N, T, D)
        q, k = norm(rotate(q, rotary)), norm(rotate(k, rotary))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, N, T, D)
        out: Tensor = self.attention_out(y.transpose(1, 2).reshape(batch, positions, width))
        return out


class Linear(nn.Linear):
    """Without bias, and without torch's own initialisation: the values come from the swarm's base."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Without torch's own initialisation, like Linear."""

    def reset_parameters(self) -> None:
        pass


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary_table(positions: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, D/2), of rotary position embeddings (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), ROTARY_PERIOD**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every head, (B, N, T, D), by their position's angles."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def tensor_specs(config: GptConfig) -> tuple[TensorSpec, ...]:
    """The model's parameters in the order of `named_parameters`, and how each starts. Allocates no parameter."""
    return list_specs(lambda: Gpt(config), _start)


def _start(name: str, shape: Shape) -> TensorSpec:
    if name == "head.weight" or name.endswith("_out.weight"):
        return TensorSpec(name=name, shape=shape, init=ZEROS)
    if name == "embedding.weight":  # its rows are normed at once, so that only their direction counts
        return TensorSpec(name=name, shape=shape, init=UNIFORM, std=1.0)
    return start_uniform(name, shape)
