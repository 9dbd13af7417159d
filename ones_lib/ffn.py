"""The weights of a transformer's feed-forward network (FFN), or of a bank of E experts stacked on axis 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class GatedActivation:
    """An activation of gate and up together, for networks that compute more than ``act(gate) * up``, such as GPT-OSS's.

    Args:
        gated: function of the pre-activations ``gate`` and ``up`` [..., h], unit by unit.
    """

    def __init__(self, gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.gated = gated


@dataclass(frozen=True, eq=False)
class FeedForwardWeights:
    """One FFN, or a bank of E experts, as plain tensors.

    Plain: ``FFN(x) = down @ act(up @ x + up_bias) + down_bias``.
    Gated (SwiGLU and similar): ``FFN(x) = down @ (act(gate @ x + gate_bias) * (up @ x + up_bias)) + down_bias``.

    Shapes, with E experts, h = d_ff hidden neurons and model width d; a single FFN lacks the leading axis:

    ========== =========== ====================================
    up, gate   [E, h, d]   row j: input weights of neuron j
    down       [E, d, h]   column j: output weights of neuron j
    up_bias    [E, h]      also gate_bias
    down_bias  [E, d]
    ========== =========== ====================================

    Raises:
        ValueError: the shape, dtype or device of a tensor does not fit ``up``.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.up.ndim not in (2, 3):
            raise ValueError(f"up: expected [h, d] for one FFN or [E, h, d] for a bank, found {list(self.up.shape)}")
        *lead, h, d = self.up.shape
        expected = {
            "down": [*lead, d, h],
            "gate": [*lead, h, d],
            "up_bias": [*lead, h],
            "gate_bias": [*lead, h],
            "down_bias": [*lead, d],
        }
        if self.gate is None and self.gate_bias is not None:
            raise ValueError("gate_bias: found a bias, expected None because gate is None")
        for name, tensor in self.tensors():
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: expected floating-point weights, found {tensor.dtype}")
            if name != "up" and list(tensor.shape) != expected[name]:
                raise ValueError(
                    f"{name}: expected {expected[name]} to go with up {list(self.up.shape)}, found {list(tensor.shape)}"
                )
            if (tensor.dtype, tensor.device) != (self.up.dtype, self.up.device):
                raise ValueError(
                    f"{name}: expected {self.up.dtype} on {self.up.device} like up, found {tensor.dtype} on {tensor.device}"
                )

    @property
    def is_bank(self) -> bool:
        return self.up.ndim == 3

    @property
    def num_experts(self) -> int:
        """E of a bank; 1 for a single FFN."""
        return self.up.shape[0] if self.is_bank else 1

    @property
    def d_ff(self) -> int:
        return self.up.shape[-2]

    @property
    def d_model(self) -> int:
        return self.up.shape[-1]

    def hidden(self, x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
        """Hidden activations [..., h] of one FFN on tokens ``x`` [..., d]."""
        if self.is_bank:
            raise ValueError(
                f"expected one FFN, found a bank of {self.num_experts} experts: choose one with .expert(i)"
            )
        hidden = F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return activation(hidden)
        gate = F.linear(x, self.gate, self.gate_bias)
        return activation.gated(gate, hidden) if isinstance(activation, GatedActivation) else activation(gate) * hidden

    def apply(self, x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
        """Output [..., d] of one FFN on tokens ``x`` [..., d]."""
        return F.linear(self.hidden(x, activation), self.down, self.down_bias)

    @classmethod
    def stack(cls, experts: Sequence[FeedForwardWeights]) -> FeedForwardWeights:
        """Stacks single FFNs of equal shape into a bank (a copy)."""
        check_alike(experts)
        return cls(**{name: torch.stack([getattr(e, name) for e in experts]) for name, _ in experts[0].tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every part that is not None, in the order of the fields."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> FeedForwardWeights:
        """Applies ``function`` to every tensor."""
        return FeedForwardWeights(**{name: function(tensor) for name, tensor in self.tensors()})

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return not any(count_non_finite(tensor) for _, tensor in self.tensors())

    def times(self, factors: Mapping[str, float | Tensor]) -> FeedForwardWeights:
        """Multiplies the named tensors by their factors; the other tensors are shared."""
        return replace(self, **{name: factors[name] * tensor for name, tensor in self.tensors() if name in factors})

    def expert(self, index: int) -> FeedForwardWeights:
        """Expert ``index`` of a bank as one FFN (views, no copy)."""
        return self.map(lambda tensor: tensor[index])

    def experts(self) -> list[FeedForwardWeights]:
        """All experts of a bank (views)."""
        # unbind has one backward pass for all experts; each .expert(i) has one of the size of the whole bank.
        parts = {name: tensor.unbind() for name, tensor in self.tensors()}
        return [FeedForwardWeights(**dict(zip(parts, one, strict=True))) for one in zip(*parts.values(), strict=True)]

    def neurons(self) -> Tensor:
        """All weights of each hidden neuron in one row: its up, gate and down weights and its biases, [..., h, p]."""
        parts = [t.mT if name == "down" else t for name, t in self.tensors() if name != "down_bias"]
        return torch.cat([t if t.ndim == self.up.ndim else t[..., None] for t in parts], dim=-1)

    def with_neurons(self, order: Tensor) -> FeedForwardWeights:
        """One FFN with the hidden neurons ``order`` [n]; a permutation leaves its function as it is."""

        def ordered(name: str, tensor: Tensor) -> Tensor:
            if name == "down_bias":
                return tensor
            return tensor[:, order] if name == "down" else tensor[order]

        return FeedForwardWeights(**{name: ordered(name, tensor) for name, tensor in self.tensors()})

    def widened(self, d_ff: int) -> FeedForwardWeights:
        """One FFN with ``d_ff`` hidden neurons and the same function.

        The added neurons repeat the first ones, with output weights of zero. With input weights of zero too, they would
        never get a gradient.
        """
        if d_ff < self.d_ff:
            raise ValueError(f"d_ff: expected at least the present {self.d_ff} neurons, found {d_ff}")
        if d_ff == self.d_ff:
            return self
        wide = self.with_neurons(torch.arange(d_ff, device=self.up.device) % self.d_ff)
        wide.down[:, self.d_ff :] = 0
        return wide


def check_alike(experts: Sequence[FeedForwardWeights]) -> None:
    """Raises ValueError unless ``experts`` are one or more single FFNs of equal shape."""
    if not experts:
        raise ValueError("experts: expected at least one expert, found none")
    shapes = [{name: list(tensor.shape) for name, tensor in expert.tensors()} for expert in experts]
    for i, (expert, shape) in enumerate(zip(experts, shapes, strict=True)):
        if expert.is_bank:
            raise ValueError(f"expert {i}: expected one FFN, found a bank of {expert.num_experts}")
        if shape != shapes[0]:
            raise ValueError(f"expert {i}: expected the shapes of expert 0, {shapes[0]}, found {shape}")


def concatenate(ffns: Sequence[FeedForwardWeights]) -> FeedForwardWeights:
    """The FFN with all hidden neurons of ``ffns`` side by side: its output is the sum of their outputs.

    If only some FFNs have a bias, the others count as having a bias of zero.
    """
    if len({ffn.gate is None for ffn in ffns}) > 1:
        raise ValueError("gate: expected all FFNs to be gated or none, found both")

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(ffn, name) for ffn in ffns]
        if all(tensor is None for tensor in tensors):
            return None
        if name == "down_bias":
            return sum(tensor for tensor in tensors if tensor is not None)
        if name in ("up_bias", "gate_bias"):
            zeros = [ffn.up.new_zeros(ffn.d_ff) for ffn in ffns]
            tensors = [zero if tensor is None else tensor for zero, tensor in zip(zeros, tensors, strict=True)]
        return torch.cat(tensors, dim=1 if name == "down" else 0)

    return FeedForwardWeights(**{f.name: joined(f.name) for f in fields(FeedForwardWeights)})


def match_neurons(reference: FeedForwardWeights, other: FeedForwardWeights) -> Tensor:
    """The order [h] of ``other``'s hidden neurons that makes its weights most similar to ``reference``'s.

    The order of hidden neurons is arbitrary, so equal functions can have different weights. This order has the largest
    inner product of all weights. It solves a linear assignment problem, as in Git Re-Basin (Ainsworth et al., arXiv
    2209.04836, section 3.2) for one hidden layer.
    """
    if reference.is_bank or other.is_bank or reference.up.shape != other.up.shape:
        shapes = f"up {list(reference.up.shape)} and {list(other.up.shape)}"
        raise ValueError(f"match_neurons: expected two single FFNs of equal shape, found {shapes}")
    products = reference.neurons() @ other.neurons().T  # [h, h]
    _, order = linear_sum_assignment(products.detach().double().cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(products.device)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64 weights."""
    return torch.promote_types(tensor.dtype, torch.float32)


CHUNK = 2**20  # elements to process at a time, so that they stay in the CPU's cache


def count_non_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    tensor = torch.atleast_1d(tensor)
    chunks = tensor.split(max(1, CHUNK * len(tensor) // max(1, tensor.numel())))
    # A sum is finite only if all its terms are, and it is faster than testing every element.
    sums = torch.stack([chunk.to(compute_dtype(tensor)).sum() for chunk in chunks])
    return 0 if torch.isfinite(sums).all() else int((~torch.isfinite(tensor)).sum())
