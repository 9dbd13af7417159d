"""Weights of one transformer feed-forward network (FFN), or of a bank of E experts stacked on axis 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeedForwardWeights:
    """One FFN, or a bank of E experts, as plain tensors.

    Plain:  ``FFN(x) = down @ act(up @ x + up_bias) + down_bias``.
    Gated (SwiGLU and its relatives): ``FFN(x) = down @ (act(gate @ x + gate_bias) * (up @ x + up_bias)) + down_bias``.

    Shapes, with E experts, d_ff hidden neurons ``h`` and model width ``d``; one FFN lacks the leading axis:

    ========== =========== ==================================
    up, gate   [E, h, d]   rows are a neuron's input weights
    down       [E, d, h]   columns are its output weights
    up_bias    [E, h]      likewise gate_bias
    down_bias  [E, d]
    ========== =========== ==================================

    Raises:
        ValueError: a tensor's shape, dtype or device does not go with ``up``'s.
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

    @classmethod
    def stack(cls, experts: Sequence[FeedForwardWeights]) -> FeedForwardWeights:
        """A bank from single FFNs of equal shape."""
        check_alike(experts)
        return cls(**{name: torch.stack([getattr(e, name) for e in experts]) for name, _ in experts[0].tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every part that is present, in the order of the fields."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> FeedForwardWeights:
        """The same structure with ``function`` applied to every tensor."""
        return FeedForwardWeights(**{name: function(tensor) for name, tensor in self.tensors()})

    def expert(self, index: int) -> FeedForwardWeights:
        """Expert ``index`` of a bank as one FFN (views, no copy)."""
        return self.map(lambda tensor: tensor[index])

    def experts(self) -> list[FeedForwardWeights]:
        """All experts of a bank (views). Their gradients come back in one piece, those of :meth:`expert` one by one, each the
        size of the bank."""
        parts = {name: tensor.unbind() for name, tensor in self.tensors()}
        return [FeedForwardWeights(**dict(zip(parts, one, strict=True))) for one in zip(*parts.values(), strict=True)]

    def neurons(self) -> Tensor:
        """Everything that belongs to one hidden neuron in a row: its up, gate and down weights and biases, [..., h, p]."""
        parts = [t.mT if name == "down" else t for name, t in self.tensors() if name != "down_bias"]
        return torch.cat([t if t.ndim == self.up.ndim else t[..., None] for t in parts], dim=-1)

    def with_neurons(self, order: Tensor) -> FeedForwardWeights:
        """One FFN with its hidden neurons in another order [h]; its function is the same."""

        def ordered(name: str, tensor: Tensor) -> Tensor:
            if name == "down_bias":
                return tensor
            return tensor[:, order] if name == "down" else tensor[order]

        return FeedForwardWeights(**{name: ordered(name, tensor) for name, tensor in self.tensors()})

    def widened(self, d_ff: int) -> FeedForwardWeights:
        """One FFN of ``d_ff`` hidden neurons that computes the same: its neurons once more, from the first on, with output
        weights of zero. (Were all their weights zero, no gradient would ever reach them.)"""
        if d_ff < self.d_ff:
            raise ValueError(f"d_ff: expected at least the {self.d_ff} neurons that there are, found {d_ff}")
        if d_ff == self.d_ff:
            return self
        wide = self.with_neurons(torch.arange(d_ff, device=self.up.device) % self.d_ff)
        wide.down[:, self.d_ff :] = 0
        return wide

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
            raise ValueError(f"expected one FFN, found a bank of {self.num_experts}; choose with .expert(i)")
        hidden = F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return activation(hidden)
        return activation(F.linear(x, self.gate, self.gate_bias)) * hidden

    def apply(self, x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
        """Output of one FFN on tokens ``x`` [..., d], with the architecture's activation (GELU by default)."""
        return F.linear(self.hidden(x, activation), self.down, self.down_bias)


def check_alike(experts: Sequence[FeedForwardWeights]) -> None:
    """Raise ValueError unless there are experts, all single FFNs of one shape; the first that differs from expert 0 is named."""
    if not experts:
        raise ValueError("experts: expected at least one expert, found none")
    shapes = [{name: list(tensor.shape) for name, tensor in expert.tensors()} for expert in experts]
    for i, (expert, shape) in enumerate(zip(experts, shapes, strict=True)):
        if expert.is_bank:
            raise ValueError(f"expert {i}: expected one FFN, found a bank of {expert.num_experts}")
        if shape != shapes[0]:
            raise ValueError(f"expert {i}: expected the shapes of expert 0, {shapes[0]}, found {shape}")


def concatenate(ffns: Sequence[FeedForwardWeights]) -> FeedForwardWeights:
    """The FFN whose output is the sum of theirs: all their hidden neurons side by side. Where some have a bias, those without
    get one of zeros."""
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
    """Order [h] of ``other``'s hidden neurons in which the two FFNs are most alike.

    The order of hidden neurons is arbitrary: FFNs that compute the same may look unlike. Of all orders this one has the
    largest inner product of all weights, a linear assignment (as in Git Re-Basin, arXiv 2209.04836, section 3.2, for one
    hidden layer).
    """
    if reference.is_bank or other.is_bank or reference.up.shape != other.up.shape:
        shapes = f"up {list(reference.up.shape)} and {list(other.up.shape)}"
        raise ValueError(f"match_neurons: expected two single FFNs of equal shape, found {shapes}")
    return best_order(reference.neurons() @ other.neurons().T)


def best_order(likeness: Tensor) -> Tensor:
    """Order [h] of the columns in which the diagonal of ``likeness`` [h, h] has the largest sum."""
    _, order = linear_sum_assignment(likeness.detach().double().cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(likeness.device)


def count_non_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    # A sum is finite only if its terms are, and quicker than looking at each.
    sums = torch.stack([part.to(compute_dtype(tensor)).sum() for part in pieces(tensor)])
    return 0 if torch.isfinite(sums).all() else int((~torch.isfinite(tensor)).sum())


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


_CHUNK = 2**20  # elements to look at in one piece: they stay in the cache


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Rows of a tensor, so many at a time that they stay in the cache."""
    return tensor.split(max(1, _CHUNK * len(tensor) // max(1, tensor.numel())))
