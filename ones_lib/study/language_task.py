"""The students of causal language models in a study: made by the conversion of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ones_lib.checkpoints.architectures import architecture_of, twin_config
from ones_lib.checkpoints.convert import convert
from ones_lib.data.keys import WHOLE, Share, training_keys
from ones_lib.data.text import Corpus
from ones_lib.data.tokens import end_tokens
from ones_lib.gathering.registry import gathering_methods
from ones_lib.models.causal import load_language_model, model_class, without_bars
from ones_lib.study.processes import merged, own_share
from ones_lib.study.training import Training

EVALUATION_BATCH = 16


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


def language_model(model: Mapping, data: Corpus, seed: int, d_ff: int | None = None) -> LanguageModel:
    """A causal model as a study configures it.

    Args:
        model: either ``checkpoint``, the folder or hub name of a trained MoE, or ``model_type`` (of
            :data:`ones_lib.checkpoints.architectures.ARCHITECTURES`) and what its configuration takes, for a new one. With
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


def language_config(model: Mapping, data: Corpus) -> PreTrainedConfig:
    """The MoE's configuration in :func:`language_model`."""
    if "checkpoint" in model:
        return AutoConfig.from_pretrained(model["checkpoint"], trust_remote_code=False)
    first, last = end_tokens(data.tokenizer)
    tokens = {"pad_token_id": data.tokenizer.pad_token_id, "bos_token_id": first, "eos_token_id": last}
    sizes = {"vocab_size": data.vocab_size, "max_position_embeddings": data.train.shape[1]}
    options = {k: v for k, v in model.items() if k not in ("model_type", "num_experts")}
    if model.get("num_experts", 1) > 1:
        options["num_experts"] = model["num_experts"]
    return AutoConfig.for_model(model["model_type"], **sizes, **tokens, **options)


class LanguageModelling:
    """Prediction of every next token."""

    metrics = ("loss", "accuracy")

    def __init__(self, data: Corpus) -> None:
        self.data = data

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Tensor]:
        """Token ids [B, L]."""
        ids = self.data.train
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
        parts, every = [], self.data.validation.split(EVALUATION_BATCH)
        for ids in own_share(every):
            batch = ids.long().to(device)
            logits, labels = model(batch).flatten(0, 1).float(), batch[:, 1:].flatten()
            losses = F.cross_entropy(logits, labels, reduction="none")
            parts.append(torch.stack([losses, logits.argmax(dim=-1) == labels]).cpu())
        return dict(zip(self.metrics, torch.cat(merged(parts, len(every)), dim=1), strict=True))


#: The control that :func:`gathered_model` knows: what is left of the MoE without its experts.
CONTROL = "zero_ffn"


def gathered_model(teacher: LanguageModel, config: Mapping, data: Corpus) -> tuple[LanguageModel, list[dict]]:
    """The student right after gathering, and the rows of :func:`ones_lib.checkpoints.convert.convert`."""
    method, options = config["method"], dict(config["options"])
    if method not in (*gathering_methods(), CONTROL):
        raise ValueError(f"method: expected one of {[*gathering_methods(), CONTROL]}, found {method!r}")
    ids = data.train
    ids = ids[:: max(1, len(ids) // config["calibration_examples"])][: config["calibration_examples"]]
    with TemporaryDirectory() as folder, without_bars():
        source, destination = config["teacher"]["model"].get("checkpoint"), Path(folder, "dense")
        if source is None:
            source = Path(folder, "moe")
            teacher.model.save_pretrained(source)
        table = convert(source, destination, "average" if method == CONTROL else method, calibration=ids, **options)
        model = load_language_model(destination, dtype=torch.float32)
    if method == CONTROL:  # only the read-out is zero, so that it can still learn
        table["output_error"] = 1.0
        generator = torch.Generator().manual_seed(config["seed"])
        for name, tensor in model.named_parameters():
            if ".mlp." in name:
                fresh = torch.randn(tensor.shape, generator=generator) * model.config.initializer_range
                tensor.data.copy_(torch.zeros_like(tensor) if "down_proj" in name else fresh)
    return LanguageModel(model), table.to_dict("records")
