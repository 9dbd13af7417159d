"""Loads and runs causal and encoder-decoder language models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as hf_logging

from ones_lib.calibration import Activation, LayerActivations


def model_class(config: PreTrainedConfig) -> type:
    """The Auto class for a config's language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def language_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's language model, such as MixtralForCausalLM."""
    return model_class(config)._model_mapping[type(config)]


def activation_of(config: PreTrainedConfig) -> Activation:
    """The activation of a model's feed-forward networks."""
    return ACT2FN[getattr(config, "hidden_act", None) or config.dense_act_fn]


def load_language_model(folder: str | Path, **options) -> PreTrainedModel:
    """The language model in a folder, in eval mode, in the dtype of its files, which have to be safetensors.

    ``options`` are those of ``from_pretrained``.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **options}
    return model_class(config).from_pretrained(folder, config=config, **options).eval()


def model_inputs(config: PreTrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a model for blocks [B, L]. An encoder-decoder reads the first half, continues with the second."""
    ids = ids.long()
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    source, target = ids.tensor_split(2, dim=1)
    return {"input_ids": source, "decoder_input_ids": target}


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of the tokens that a model predicts in blocks ``ids`` [n, L]."""
    losses = []
    for batch in hf_logging.tqdm(ids.split(4), desc="perplexity", unit="batch"):
        inputs = model_inputs(model.config, batch.to(model.device))
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        labels = list(inputs.values())[-1][:, 1:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
    return torch.cat(losses).double().mean().exp().item()


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, and of this library where it uses those."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def watched_experts(model: PreTrainedModel, see: Callable[[str, LayerActivations], None]) -> Iterator[None]:
    """While the model runs, call ``see(block, activations)`` with what passes through every MoE layer.

    The activations are those of the routed experts, without shared ones; gates include the architecture's scaling
    factor. ``block`` is the module that holds the layer, such as ``model.layers.3``.
    """
    activation = activation_of(model.config)

    def hook(block: str) -> Callable:
        def see_layer(module: nn.Module, inputs: tuple, kwargs: dict, output: Tensor) -> None:
            x, chosen, weights = (*inputs, *kwargs.values())
            if chosen.ndim == 3:  # Switch: one-hot [N, 1, E], zero for tokens beyond the capacity
                gates = (chosen.to(weights) * weights[..., None]).sum(dim=1)
            else:
                gates = weights.new_zeros(len(x), module.num_experts).scatter_add(1, chosen, weights)
            see(block, LayerActivations(*(t.detach() for t in (x, gates.to(x), output)), activation))

        return see_layer

    layers = {name: m for name, m in model.named_modules() if name.endswith(".experts") and hasattr(m, "num_experts")}
    hooks = [
        module.register_forward_hook(hook(name.rsplit(".", 2)[0]), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
