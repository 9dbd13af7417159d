"""What passes through a model's MoE layers on data: what gatherings that look at data are calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerActivations:
    """Tokens that passed through an MoE layer, N of them.

    Args:
        inputs: the layer's inputs [N, d].
        gates: of every expert [N, E], zero for those not chosen.
        outputs: the layer's outputs [N, d], without noise, capacity and dropout.
        activation: its experts'.
        weights: of the tokens in least squares [N]; None weighs them alike.
    """

    inputs: Tensor
    gates: Tensor
    outputs: Tensor
    activation: Activation
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.inputs)
        shapes = {"gates": (count, self.gates.shape[-1]), "outputs": self.inputs.shape, "weights": (count,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)} for {count} tokens, found {list(tensor.shape)}")
        if not count:
            raise ValueError("inputs: expected at least one token, found none")

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerActivations:
        """The same with ``function`` applied to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def chunks(self, size: int = 4096) -> Iterator[LayerActivations]:
        """The tokens in pieces of at most ``size``."""
        return (self.map(lambda t, i=i: t[i : i + size]) for i in range(0, len(self.inputs), size))

    def token_weights(self) -> Tensor:
        """[N]: ``weights``, or ones."""
        return torch.ones_like(self.inputs[:, 0]) if self.weights is None else self.weights

    def expert_weights(self) -> Tensor:
        """[E]: part of all gates that each expert got, how much the router uses it; sums to 1."""
        return self.gates.sum(dim=0) / self.gates.sum()

    def expert_frequencies(self) -> Tensor:
        """[E]: part of all choices of an expert that fell on each; sums to 1."""
        chosen = (self.gates != 0).to(self.gates.dtype).sum(dim=0)
        return chosen / chosen.sum()

    def gate_sum(self) -> float:
        """What a token's gates sum to, on average: 1 where they are renormalised, and where not from k/E to 1."""
        return self.gates.sum(dim=1).mean().item()


def collect_activations(
    model: nn.Module,
    forward: Callable[[nn.Module, object], object],
    batches: Iterable,
    max_tokens: int = 4096,
    seed: int = 0,
) -> dict[str, LayerActivations]:
    """Activations of every MoE layer by its name in ``model`` while ``forward(model, batch)`` runs it on ``batches``.

    One pass, in a stream: of all the tokens of a layer a random draw of at most ``max_tokens`` is kept, in the order in
    which they came, so that memory does not grow with their number. A layer shared across depth is passed through several
    times a batch, and all of them count. Depths differ in the size of what they add; ``weights`` divides the squared error
    of each by its mean squared output, so that every depth's relative error counts alike, and has mean 1.

    Raises:
        ValueError: the model is in training mode (its routers add noise), or no tokens came by.
    """
    if model.training:
        raise ValueError("model: expected a model in eval mode, found one in training mode: its routers add noise")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoEFeedForward) and m.router is not None}
    draws = {name: _Draw(max_tokens, seed) for name in layers}
    depth = dict.fromkeys(layers, 0)  # passes through the layer in this batch

    def see(name: str) -> Callable:
        def hook(layer: MoEFeedForward, inputs: tuple, output: Tensor) -> None:
            x, mask = inputs if len(inputs) > 1 else (*inputs, None)
            kept = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
            draws[name].add(depth[name], x[kept], layer.token_gates(x, mask)[kept], output[kept])
            depth[name] += 1

        return hook

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                depth.update(dict.fromkeys(layers, 0))
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: draws[name].activations(layer.activation) for name, layer in layers.items()}


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate a whole model's layers on: a few batches, and ``forward(model, batch)``, which runs a model on one.

    Of each layer's tokens ``max_tokens`` are kept.
    """

    forward: Callable[[nn.Module, object], object]
    batches: Sequence
    max_tokens: int = 32768

    def activations(self, model: nn.Module) -> dict[str, LayerActivations]:
        """See :func:`collect_activations`."""
        return collect_activations(model, self.forward, self.batches, self.max_tokens)


class _Draw:
    """A uniform draw from a stream: every token gets a random number, and those with the least are kept."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)
        # By batch: numbers [n], depths [n], inputs [n, d], gates [n, E], outputs [n, d].
        self.kept: list[list[Tensor]] = []
        self.count, self.limit = 0, torch.inf  # tokens kept; numbers above the limit have no chance any more
        self.squares: dict[int, list[float]] = {}  # of the outputs by depth: their sum, and of how many tokens

    def add(self, depth: int, inputs: Tensor, gates: Tensor, outputs: Tensor) -> None:
        total = self.squares.setdefault(depth, [0.0, 0])
        total[0] += outputs.double().square().sum().item()
        total[1] += len(outputs)
        numbers = torch.rand(len(inputs), generator=self.generator, dtype=torch.float64)
        parts = [numbers, torch.full((len(inputs),), depth), inputs, gates, outputs]
        if self.limit < torch.inf:
            chance = (numbers <= self.limit).nonzero()[:, 0]
            parts = [tensor[chance.to(tensor.device)] for tensor in parts]
        self.kept.append(parts)
        self.count += len(parts[0])
        if self.count > 2 * self.size:
            self._drop()

    def _drop(self) -> None:
        """Leave the tokens with the least numbers, in the order in which they came."""
        parts = [torch.cat(batches) for batches in zip(*self.kept, strict=True)]
        if len(parts[0]) > self.size:
            least, chosen = parts[0].topk(self.size, largest=False)
            self.limit, chosen = least.max().item(), chosen.sort().values
            parts = [tensor[chosen.to(tensor.device)] for tensor in parts]
        self.kept, self.count = [parts], len(parts[0])

    def activations(self, activation: Activation) -> LayerActivations:
        if not self.count:
            raise ValueError("batches: expected at least one token to pass through every MoE layer, found none")
        self._drop()
        ((_, depths, inputs, gates, outputs),) = self.kept
        means = torch.tensor([square / max(count, 1) for square, count in self.squares.values()], dtype=torch.float64)
        weights = torch.where(means > 0, 1 / means, 0.0)[depths]
        weights = weights / weights.mean() if weights.sum() > 0 else torch.ones_like(weights)
        return LayerActivations(inputs, gates, outputs, activation, weights.to(inputs))


def squared_error(ffn: FeedForwardWeights, calibration: LayerActivations) -> float:
    """Squared error of an FFN's output on the tokens over the squared output of the layer, with the tokens' weights."""
    error = size = 0.0
    for chunk in calibration.chunks():
        weights = chunk.token_weights().double()
        output = ffn.apply(chunk.inputs, chunk.activation)
        error = error + (weights * (output - chunk.outputs).double().square().sum(dim=1)).sum()
        size = size + (weights * chunk.outputs.double().square().sum(dim=1)).sum()
    return (error / size).item()
