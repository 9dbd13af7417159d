"""Tiny random MoEs of every model type, for tests."""

import re
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig

from ones_lib.checkpoints.architectures import Architecture
from ones_lib.models.causal import model_inputs, new_model

TYPES = yaml.safe_load(Path(__file__).with_name("moe_types.yaml").read_text())
CONFIGS = {kind: entry["config"] for kind, entry in TYPES.items() if "config" in entry}


def moe(kind, equal=False, same_gates=False, seed=0, **changes):
    """A random model with weights large enough that everything counts, correction biases of routers too.

    ``equal``: all experts are the first one. ``same_gates``: the routers do not care which token it is.
    """
    model = new_model(AutoConfig.for_model(kind, **CONFIGS[kind] | changes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.copy_(tensor + noise / 2 if "norm" in name.split(".")[-2] and tensor.ndim == 1 else noise)
            elif name.endswith(("correction_bias", "expert_bias")):
                tensor.copy_(noise)
        for name, experts in Architecture.text_experts(model).items():
            if equal:
                _make_equal(experts)
            if same_gates:
                _silence(model.get_submodule(name.rpartition(".")[0]), experts.num_experts)
    return model


def perplexity(model, ids):
    """``exp`` of the mean negative log-likelihood of the tokens that a model predicts in blocks [n, L], in float64."""
    losses = []
    for row in ids.long().split(1):
        inputs = model_inputs(model, row)
        with torch.no_grad():
            found = model(**inputs, use_cache=False).logits[0, :-1].double().log_softmax(dim=-1)
        losses.append(-found.gather(1, list(inputs.values())[-1][0, 1:, None]))
    return torch.cat(losses).mean().exp().item()


def _make_equal(experts):
    stacked = dict(experts.named_parameters(recurse=False))
    for tensor in stacked.values():
        tensor.copy_(tensor[:1].expand_as(tensor))
    if not stacked:  # each is a module
        first, *others = experts.children()
        for other in others:
            other.load_state_dict(first.state_dict())


def _silence(layer, count):
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        by_expert = tensor.ndim and tensor.shape[0] in (count, count + 1) and tensor.is_floating_point()
        if by_expert and not re.match(r"experts\.|shared|.*norm", name):
            tensor.copy_(torch.ones_like(tensor) if "scale" in name else torch.zeros_like(tensor))
