"""Inputs, gates and outputs of a model's MoE layers on data, for the gathering methods that use data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ones_lib.ffn import FeedForwardWeights, GatedActivation
from ones_lib.moe import MoEFeedForward, Router

Activation = Callable[[Tensor], Tensor] | GatedActivation


@dataclass(frozen=True)
class LayerActivations:
    """N tokens at an MoE layer.

    Args:
        inputs: the layer's inputs [N, d].
        gates: each expert's gate [N, E]; zero where the expert is not chosen.
        outputs: the layer's outputs [N, d] in evaluation: without noise, capacity limit and dropout.
        activation: the experts' activation function.
        weights: of each token in least squares [N]; None for equal weights.
        probabilities: the router's, of all experts, before the top k [N, E]; None where they are not known.
    """

    inputs: Tensor
    gates: Tensor
    outputs: Tensor
    activation: Activation
    weights: Tensor | None = None
    probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.inputs)
        shapes = {"gates": (count, self.gates.shape[-1]), "outputs": self.inputs.shape, "weights": (count,)}
        shapes["probabilities"] = self.gates.shape
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)} for {count} tokens, found {list(tensor.shape)}")
        if not count:
            raise ValueError("inputs: expected at least one token, found none")

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerActivations:
        """Applies ``function`` to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def chunks(self, size: int = 4096) -> Iterator[LayerActivations]:
        """The tokens, at most ``size`` at a time."""
        return (self.map(lambda t, i=i: t[i : i + size]) for i in range(0, len(self.inputs), size))

    def token_weights(self) -> Tensor:
        """``weights``, or ones, [N]."""
        return torch.ones_like(self.inputs[:, 0]) if self.weights is None else self.weights

    def expert_weights(self) -> Tensor:
        """Each expert's share of all gates [E]; sums to 1."""
        return self.gates.sum(dim=0) / self.gates.sum()

    def expert_frequencies(self) -> Tensor:
        """Each expert's share of all assignments [E]; sums to 1."""
        chosen = (self.gates != 0).to(self.gates.dtype).sum(dim=0)
        return chosen / chosen.sum()

    def gate_sum(self) -> float:
        """s, the mean over tokens of the sum of the gates: 1 if they are renormalised, between k/E and 1 if not; an
        architecture's scaling factor multiplies it."""
        return self.gates.sum(dim=1).mean().item()

    def squared_error(self, ffn: FeedForwardWeights) -> float:
        """Weighted squared error of ``ffn``'s output against the layer's, divided by the layer's weighted squared output."""
        return squared_error_on(ffn, self.chunks())


def squared_error_on(ffn: FeedForwardWeights, chunks: Iterable[LayerActivations]) -> float:
    """:meth:`LayerActivations.squared_error` of tokens that come chunk by chunk."""
    error = size = 0.0
    for chunk in chunks:
        weights = _precise(chunk.token_weights())
        output = ffn.apply(chunk.inputs, chunk.activation)
        error = error + (weights * _precise(output - chunk.outputs).square().sum(dim=1)).sum()
        size = size + (weights * _precise(chunk.outputs).square().sum(dim=1)).sum()
    return (error / size).item()


def _precise(tensor: Tensor) -> Tensor:
    """The tensor in float64; of Apple's GPUs, which have none, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def collect_activations(
    model: nn.Module,
    forward: Callable[[nn.Module, object], object],
    batches: Iterable,
    max_tokens: int = 4096,
) -> dict[str, LayerActivations]:
    """Runs ``forward(model, batch)`` on ``batches`` and records every MoE layer's activations, by the layer's name in ``model``.

    Of each layer's tokens, a uniform random draw of at most ``max_tokens`` is kept, in the order of the stream, so memory
    does not grow with the data. A layer shared across depth sees several passes per batch, and all of them count. Its depths
    differ in the size of their outputs: ``weights`` is proportional to 1 / (mean squared output of the token's depth), with
    mean 1, so that every depth's relative error counts equally.

    Raises:
        ValueError: the model is in training mode, or a layer got no tokens.
    """
    if model.training:
        raise ValueError("model: expected eval mode, found training mode, in which routers add noise")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoEFeedForward) and m.router is not None}
    draws = {name: _Draw(max_tokens) for name in layers}
    depth = dict.fromkeys(layers, 0)  # how often this batch has passed the layer

    def record(name: str) -> Callable:
        def hook(layer: MoEFeedForward, inputs: tuple, output: Tensor) -> None:
            x, mask = inputs if len(inputs) > 1 else (*inputs, None)
            kept = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
            if isinstance(layer.router, Router):
                routing, rows = layer.router(x.reshape(-1, x.shape[-1])), kept.flatten()
                gates, probabilities = routing.all_gates()[rows], [routing.probabilities[rows]]
            else:
                gates, probabilities = layer.token_gates(x, mask)[kept], []
            draws[name].add(depth[name], x[kept], gates, output[kept], *probabilities)
            depth[name] += 1

        return hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
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
    """Data for :func:`collect_activations`: ``batches``, and ``forward(model, batch)``, which runs a model on one of them."""

    forward: Callable[[nn.Module, object], object]
    batches: Sequence
    max_tokens: int = 32768

    def activations(self, model: nn.Module) -> dict[str, LayerActivations]:
        """The activations of a model's MoE layers, by name."""
        return collect_activations(model, self.forward, self.batches, self.max_tokens)


class _Draw:
    """A uniform draw from a stream of tokens: each token gets a random number, and those with the smallest are kept."""

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(0)
        # Batches of [random numbers [n], depths [n], inputs [n, d], gates [n, E], outputs [n, d], perhaps probabilities [n, E]].
        self.kept: list[list[Tensor]] = []
        self.squares: dict[int, list[float]] = {}  # by depth: sum of the squared outputs, number of tokens

    def add(self, depth: int, inputs: Tensor, gates: Tensor, outputs: Tensor, *probabilities: Tensor) -> None:
        total = self.squares.setdefault(depth, [0.0, 0])
        total[0] += _precise(outputs).square().sum().item()
        total[1] += len(outputs)
        numbers = torch.rand(len(inputs), generator=self.generator, dtype=torch.float64)
        self.kept.append([numbers, torch.full((len(inputs),), depth), inputs, gates, outputs, *probabilities])
        if sum(len(numbers) for numbers, *_ in self.kept) > 2 * self.size:
            self._drop()

    def _drop(self) -> None:
        """Keeps the ``size`` tokens with the smallest numbers, in the order of the stream."""
        parts = [torch.cat(batches) for batches in zip(*self.kept, strict=True)]
        chosen = parts[0].argsort()[: self.size].sort().values
        self.kept = [[tensor[chosen.to(tensor.device)] for tensor in parts]]

    def activations(self, activation: Activation) -> LayerActivations:
        if not any(len(numbers) for numbers, *_ in self.kept):
            raise ValueError("batches: expected at least one token at every MoE layer, found none")
        self._drop()
        ((_, depths, inputs, gates, outputs, *probabilities),) = self.kept
        means = torch.tensor([square / max(count, 1) for square, count in self.squares.values()], dtype=torch.float64)
        weights = torch.where(means > 0, 1 / means, 0.0)[depths]
        weights = weights / weights.mean() if weights.sum() > 0 else torch.ones_like(weights)
        return LayerActivations(inputs, gates, outputs, activation, weights.to(inputs), *probabilities)
