"""How a gradient becomes an inner step: the interface and the table of inner optimizers.

"adamw" (arXiv 1711.05101), the default.

"muon" (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; inside DiLoCo it is MuLoCo,
arXiv 2505.23725): orthogonalised momentum for hidden weights (TensorSpec.is_hidden), AdamW for embeddings, heads and
vectors.

"mtdao" (arXiv 2510.05361, with N = 1 momentum): a momentum that outlasts a round, mixed with the gradient itself.

Each of them takes AdamW's learning rate and weight decay. Vectors (gains and biases) are not decayed. None of them is
a torch.optim.Optimizer: to make one imports torch's compiler, over a second and 70 MB more a trainer.

Invariant: the state is what `tensors` gives and nothing else, so that an optimizer into whose tensors those of another
one were copied takes the same steps as that one, to the bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoal.protocol.layout import TensorSpec
from shoal.protocol.manifest import ADAMW, MTDAO, MUON, Training

# Adam's moments for language models at small batches; the published DiLoCo runs use the same.
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8

MUON_MOMENTUM = 0.95
# Five steps of the quintic whose slope at 0 is as large as it can be; what it makes of a singular value lies near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NORM_MIN = 1e-20
# The root mean square of AdamW's usual update (arXiv 2502.16982, section 2.2).
ADAM_RMS = 0.2

# A half-life of 138 steps, in the place of the 7 of Adam's 0.9. Both numbers are QHAdam's advice (arXiv 1810.06801):
# down gradients that are all noise they make steps of 0.31 of the rate, where AdamW's are 0.23.
SLOW_BETA = 0.995
SLOW_SHARE = 0.7

Named = tuple[TensorSpec, nn.Parameter]


class InnerOptimizer(Protocol):
    """Owns what it remembers of past gradients. The parameters are the caller's; so are their gradients, which stay
    the same tensors from the moment at which the optimizer is made."""

    def step(self, rate: float) -> None:
        """Apply the gradients that the parameters hold, at this learning rate."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The live state: whoever copies into these tensors puts the optimizer where another one was. All zeros is the
        state of one that has seen nothing."""
        ...


class AdamW:
    """By torch's own kernel."""

    def __init__(self, parameters: Sequence[Named], training: Training) -> None:
        decayed = [parameter for _, parameter in parameters if parameter.dim() >= 2]
        rest = [parameter for _, parameter in parameters if parameter.dim() < 2]
        groups = ((decayed, training.weight_decay), (rest, 0.0))
        self._groups = tuple((_Moments(members), decay) for members, decay in groups if members)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for moments, decay in self._groups:
            adamw(
                moments.parameters,
                moments.gradients,
                moments.first,
                moments.second,
                [],
                moments.steps,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=ADAM_BETAS[0],
                beta2=ADAM_BETAS[1],
                lr=rate,
                weight_decay=decay,
                eps=ADAM_EPSILON,
            )

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, (moments, _) in enumerate(self._groups):
            for name, members in (("first", moments.first), ("second", moments.second), ("steps", moments.steps)):
                found |= {f"optimizer.{number}.{name}.{at}": one for at, one in enumerate(members)}
        return found


class Muon:
    """Nesterov momentum whose matrix is orthogonalised before it is applied; AdamW for what is no hidden weight.

    A tensor of more than two dimensions is the matrix of its first one by all others."""

    def __init__(self, parameters: Sequence[Named], training: Training) -> None:
        hidden = [parameter for spec, parameter in parameters if spec.is_hidden]
        self._rest = AdamW([(spec, parameter) for spec, parameter in parameters if not spec.is_hidden], training)
        self._decay = training.weight_decay
        self._hidden = [(parameter, hold_gradient(parameter), torch.zeros_like(parameter)) for parameter in hidden]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self._rest.step(rate)
        for parameter, gradient, momentum in self._hidden:
            momentum.mul_(MUON_MOMENTUM).add_(gradient)
            ahead = torch.add(gradient, momentum, alpha=MUON_MOMENTUM).flatten(1)  # (rows, columns)
            # The root mean square of an orthogonal matrix is 1 / sqrt(max(rows, columns)).
            length = rate * ADAM_RMS * math.sqrt(max(ahead.shape))
            parameter.mul_(1.0 - rate * self._decay)
            parameter.add_(orthogonalise(ahead).reshape(parameter.shape), alpha=-length)

    def tensors(self) -> dict[str, Tensor]:
        momenta = {f"optimizer.momentum.{at}": momentum for at, (_, _, momentum) in enumerate(self._hidden)}
        return self._rest.tensors() | momenta


class MtDao:
    """theta -= rate * ((1 - share) * gradient + share * slow) / (sqrt(second) + epsilon), where `slow` and `second` are
    means of the gradient and of its square, free of bias as Adam's are. Needs the memory of AdamW."""

    def __init__(self, parameters: Sequence[Named], training: Training) -> None:
        self._moments = _Moments([parameter for _, parameter in parameters])
        self._decays = [training.weight_decay if parameter.dim() >= 2 else 0.0 for _, parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        moments = self._moments
        rows = zip(moments.parameters, moments.gradients, moments.first, moments.second, strict=True)
        for (parameter, gradient, slow, second), steps, decay in zip(rows, moments.steps, self._decays, strict=True):
            steps.add_(1)
            slow.lerp_(gradient, 1.0 - SLOW_BETA)
            second.lerp_(gradient.square(), 1.0 - ADAM_BETAS[1])
            # Tensors and not numbers, so that a GPU is not waited for.
            direction = torch.lerp(gradient, slow / (1.0 - SLOW_BETA**steps), SLOW_SHARE)
            direction.div_((second / (1.0 - ADAM_BETAS[1] ** steps)).sqrt_().add_(ADAM_EPSILON))
            parameter.mul_(1.0 - rate * decay).add_(direction, alpha=-rate)

    def tensors(self) -> dict[str, Tensor]:
        moments = self._moments
        names = (("slow", moments.first), ("second", moments.second), ("seen", moments.steps))
        return {f"optimizer.{name}.{at}": one for name, members in names for at, one in enumerate(members)}


class _Moments:
    """Some parameters, their gradients and moments, and how many gradients each has seen."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = [*parameters]
        self.gradients = [hold_gradient(parameter) for parameter in parameters]
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in parameters]


INNER_OPTIMIZERS: Mapping[str, Callable[[Sequence[Named], Training], InnerOptimizer]] = MappingProxyType(
    {ADAMW: AdamW, MUON: Muon, MTDAO: MtDao}
)


def hold_gradient(parameter: nn.Parameter) -> Tensor:
    """The tensor of this parameter's gradient, made where there is none yet, so that a parameter which took no part in
    a batch has one, too."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix (rows, columns) with each of its singular values replaced by one near 1, some 0.7 to 1.2, unless it is
    below a hundredth of the norm; of the matrix's dtype. A matrix of zeros stays one.

    In bfloat16 on a GPU, where the product of matrices is fast and this much precision is enough, else in float32."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # its Gram matrix is the smaller one
    # Scaled before it is rounded. The norm is the root of the sum of squares, and no singular value exceeds it.
    x = x / x.norm().clamp(min=NORM_MIN)
    x = x.bfloat16() if matrix.is_cuda else x
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.T if tall else x).to(matrix.dtype)
