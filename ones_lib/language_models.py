"""Causal and encoder-decoder language models of transformers: their text, their perplexity, what passes through their experts,
and the task to train and distil them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as hf_logging

from ones_lib.architectures import architecture_of, twin_config
from ones_lib.calibration import Activation, LayerActivations
from ones_lib.data.keys import WHOLE, Share, training_keys
from ones_lib.data.text import TextData, end_tokens, pack, read_texts
from ones_lib.processes import merged, own_share
from ones_lib.training import Training

BLOCK = 512  # tokens of a block of text, if the model can take so many
EVALUATION_BATCH = 16


def model_class(config: PreTrainedConfig) -> type:
    """The Auto class that makes a language model of a configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def language_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class itself."""
    return model_class(config)._model_mapping[type(config)]


def activation_of(config: PreTrainedConfig) -> Activation:
    """The activation of a model's feed-forward networks."""
    return ACT2FN[getattr(config, "hidden_act", None) or config.dense_act_fn]


def block_length(config: PreTrainedConfig) -> int:
    """Tokens of a block of text for a model."""
    return min(BLOCK, getattr(config, "max_position_embeddings", None) or BLOCK)


def load_language_model(folder: str | Path, **options) -> PreTrainedModel:
    """The language model in a folder, in eval mode, in the dtype in which it is stored; ``options`` are of ``from_pretrained``.
    Weights are read from safetensors alone."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **options}
    return model_class(config).from_pretrained(folder, config=config, **options).eval()


def text_blocks(text: str | Path, folder: str | Path, tokens: int | None = None, split: str = "validation") -> Tensor:
    """Token ids [n, L] of a text, by the tokenizer of the model in ``folder``.

    Args:
        text: a plain text file, a file or folder of texts, ``"docstrings"`` (the embedded text), or a hub name; see
            :func:`ones_lib.data.text.read_texts`.
        tokens: how many to take, at most, in evenly spaced blocks. None: all.
        split: of what has several.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, to read text with: {error}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    texts = read_texts(text, split)
    length = block_length(config)
    blocks = pack(texts, tokenizer, length)
    if int(blocks.max()) >= config.vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, as the model's, found {len(tokenizer)}"
        )
    count = len(blocks) if tokens is None else max(1, tokens // length)
    return blocks[:: max(1, len(blocks) // count)][:count]


def model_inputs(config: PreTrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """What a model is called with for blocks [B, L]; an encoder-decoder reads the first half and continues with the second."""
    ids = ids.long()
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    source, target = ids.tensor_split(2, dim=1)
    return {"input_ids": source, "decoder_input_ids": target}


def next_token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats [B, n] of every token of blocks [B, L] that the model predicts."""
    inputs = model_inputs(model.config, ids.to(model.device))
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = list(inputs.values())[-1][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of the tokens in blocks ``ids`` [n, L]."""
    parts = hf_logging.tqdm(ids.split(4), desc="perplexity", unit="batch")
    losses = torch.cat([next_token_losses(model, part) for part in parts])
    return losses.double().mean().exp().item()


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers, and of what uses its bars, such as where many models are opened side by side."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def watched_experts(model: PreTrainedModel, see: Callable[[str, LayerActivations], None]) -> Iterator[None]:
    """Call ``see(block, activations)`` with what passes through every MoE layer while the model runs.

    Looked at are the experts' inputs, gates and outputs: all that is routed, without shared experts, with the scale of the
    gates that an architecture has. ``block`` is the module that holds the layer, such as ``model.layers.3``.
    """
    activation = activation_of(model.config)

    def hook(block: str) -> Callable:
        def see_layer(module: nn.Module, inputs: tuple, kwargs: dict, output: Tensor) -> None:
            x, chosen, weights = (*inputs, *kwargs.values())
            if chosen.ndim == 3:  # Switch: one-hot [N, 1, E], with tokens beyond the capacity left out
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


class LanguageModel(nn.Module):
    """A causal language model of transformers as the training loop takes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._balance: Tensor | float = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, L - 1, V] of the tokens after the first of ``ids`` [B, L]."""
        sparse = self.training and getattr(self.model.config, "num_experts_per_tok", None) is not None
        output = self.model(ids, use_cache=False, **({"output_router_logits": True} if sparse else {}))
        found = getattr(output, "aux_loss", None)  # None where all layers of an MoE class are dense
        self._balance = 0.0 if found is None else found
        return output.logits[:, :-1]

    def balance_loss(self) -> Tensor | float:
        """That of the last forward pass."""
        return self._balance


def language_model(model: Mapping, data: TextData, seed: int, d_ff: int | None = None) -> LanguageModel:
    """A causal model as a study configures it.

    Args:
        model: either ``checkpoint``, the folder or hub name of a trained MoE, or ``model_type`` (of
            :data:`ones_lib.architectures.ARCHITECTURES`) and what its configuration takes, for a new one. With
            ``num_experts`` of 1 it is the new dense model of the MoE's architecture.
        data: gives vocabulary and length.
        seed: of the initialisation.
        d_ff: width of a dense model; None: one expert's.
    """
    if "checkpoint" in model and model.get("num_experts") != 1:
        return LanguageModel(load_language_model(model["checkpoint"], dtype=torch.float32))
    config = language_config(model, data)
    if model.get("num_experts") == 1:
        architecture = architecture_of(config, model.get("checkpoint", config.model_type))
        config = twin_config(config, architecture, d_ff or getattr(config, architecture.width))
    with torch.random.fork_rng():
        set_seed(seed)
        return LanguageModel(model_class(config).from_config(config, dtype=torch.float32))


def language_config(model: Mapping, data: TextData) -> PreTrainedConfig:
    """The MoE's configuration in :func:`language_model`."""
    if "checkpoint" in model:
        return AutoConfig.from_pretrained(model["checkpoint"], trust_remote_code=False)
    first, last = end_tokens(data.tokenizer)
    tokens = {"pad_token_id": data.tokenizer.pad_token_id, "bos_token_id": first, "eos_token_id": last}
    sizes = {"vocab_size": data.vocab_size, "max_position_embeddings": data.corpus["train"].shape[1]}
    options = {k: v for k, v in model.items() if k not in ("model_type", "num_experts")}
    if model.get("num_experts", 1) > 1:
        options["num_experts"] = model["num_experts"]
    return AutoConfig.for_model(model["model_type"], **sizes, **tokens, **options)


class LanguageModelling:
    """Prediction of every next token."""

    metrics = ("loss", "accuracy")

    def __init__(self, data: TextData) -> None:
        self.data = data

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Tensor]:
        """Token ids [B, L]."""
        ids = self.data.corpus["train"]
        for keys in training_keys(len(ids), training.batch_size, seed, start, training.steps, share):
            yield ids[keys[:, 0]].long().to(device)

    def count(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def loss(self, logits: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def accuracy(self, logits: Tensor, batch: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == batch[:, 1:]).float().mean()

    @torch.inference_mode()
    def predict(self, model: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
        """Of every token of the validation sequences but the first: ``loss`` (nats), ``accuracy`` (right or not)."""
        model.eval()
        parts, every = [], self.data.corpus["validation"].split(EVALUATION_BATCH)
        for ids in own_share(every):
            batch = ids.long().to(device)
            logits, labels = model(batch).flatten(0, 1).float(), batch[:, 1:].flatten()
            losses = F.cross_entropy(logits, labels, reduction="none")
            parts.append(torch.stack([losses, logits.argmax(dim=-1) == labels]).cpu())
        return dict(zip(self.metrics, torch.cat(merged(parts, len(every)), dim=1), strict=True))
