"""The students of causal language models in a study: made by the conversion of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ones_lib.checkpoints.convert import convert
from ones_lib.checkpoints.plan import dense_config
from ones_lib.checkpoints.text import thinned
from ones_lib.data.keys import WHOLE, Share, training_keys
from ones_lib.data.text import Corpus
from ones_lib.data.tokens import end_tokens
from ones_lib.gathering.registry import gathering_methods
from ones_lib.integration import FRESH
from ones_lib.models.causal import (
    block_of,
    experts_modules,
    load_language_model,
    model_config,
    new_model,
    without_bars,
)
from ones_lib.study.inputs import located
from ones_lib.study.processes import merged, own_share
from ones_lib.study.training import Training

EVALUATION_BATCH = 16
BIAS_STEP = 0.01  # of a router's correction, each step


class LanguageModel(nn.Module):
    """A causal language model of transformers as the training loop takes it.

    Its parts stay where they are if they were loaded to several places (``device_map``). Routers with a correction bias are
    balanced by it in training, as DeepSeek-V3's and GLM-4.5's are (arXiv 2412.19437, section 2.1.2): transformers has no loss
    for these.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._balance: Tensor | float = 0.0
        # An MoE's class, all of whose layers are dense, may compute the loss of no router.
        self._sparse = getattr(model.config, "num_experts_per_tok", None) is not None and bool(experts_modules(model))
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(_correct_bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, L - 1, V] of the tokens after the first of ``ids`` [B, L]."""
        routers = {"output_router_logits": True} if self.training and self._sparse else {}
        output = self.model(ids, use_cache=False, **routers)
        found = getattr(output, "aux_loss", None)
        self._balance = 0.0 if found is None else found
        return output.logits[:, :-1]

    def to(self, *args, **kwargs) -> LanguageModel:
        return self if hasattr(self.model, "hf_device_map") else super().to(*args, **kwargs)

    def balance_loss(self) -> Tensor | float:
        """That of the last forward pass."""
        return self._balance


def _correct_bias(router: nn.Module, inputs: tuple, output: object) -> None:
    """Raise the bias of experts with fewer tokens than the mean, lower that of the others."""
    chosen = [t for t in output if torch.is_tensor(t) and not t.is_floating_point()] if router.training else []
    for experts in chosen:
        load = torch.bincount(experts.flatten(), minlength=len(router.e_score_correction_bias)).float()
        router.e_score_correction_bias.add_(BIAS_STEP * (load.mean() - load).sign())


def language_model(model: Mapping, data: Corpus, seed: int, dense: bool = False) -> LanguageModel:
    """A causal model as a study configures it.

    Args:
        model: either ``checkpoint``, the folder or hub name of a trained MoE, or ``model_type`` (an MoE type of transformers) and
            what its configuration takes, for a new one. And ``dense_width``, what the routed experts of its dense models are
            gathered to: a number, ``"active"``, or None for one expert's width.
        data: gives vocabulary and length.
        seed: of the initialisation.
        dense: make the new dense model of the MoE's architecture instead.
    """
    if "checkpoint" in model and not dense:
        return LanguageModel(load_language_model(located(model["checkpoint"]), dtype=torch.float32))
    config = language_config(model, data)
    if dense:
        config = dense_config(config, model.get("dense_width"))
    with torch.random.fork_rng():
        set_seed(seed)
        return LanguageModel(new_model(config, dtype=torch.float32))


def language_config(model: Mapping, data: Corpus) -> PreTrainedConfig:
    """The MoE's configuration in :func:`language_model`."""
    if "checkpoint" in model:
        return model_config(located(model["checkpoint"]))
    first, last = end_tokens(data.tokenizer)
    tokens = {"pad_token_id": data.tokenizer.pad_token_id, "bos_token_id": first, "eos_token_id": last}
    sizes = {"vocab_size": data.vocab_size, "max_position_embeddings": data.train.shape[1]}
    options = {k: v for k, v in model.items() if k not in ("model_type", "dense_width")}
    return AutoConfig.for_model(model["model_type"], **sizes, **tokens, **options)


class Sequences(Protocol):
    """Token ids [n, L] to train on and to measure on."""

    train: Tensor
    validation: Tensor


class LanguageModelling:
    """Prediction of every next token."""

    metrics = ("loss", "accuracy")

    def __init__(self, data: Sequences, evaluation_batch: int = EVALUATION_BATCH) -> None:
        self.data, self.evaluation_batch = data, evaluation_batch

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
    def divergence(self, model: nn.Module, teacher: nn.Module, device: torch.device) -> Tensor:
        """KL of the model's predictions from the teacher's, ``KL(teacher || model)`` in nats, of every token that
        :meth:`predict` measures, [n]."""

        def measure(batch: Tensor) -> Tensor:
            own, its = (m(batch).flatten(0, 1).float().log_softmax(dim=-1) for m in (model, teacher))
            return F.kl_div(own, its, reduction="none", log_target=True).sum(dim=-1)

        model.eval()
        teacher.eval().to(device)
        return self._of_every_token(measure, device)

    @torch.inference_mode()
    def predict(self, model: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
        """Of every token of the validation sequences but the first: ``loss`` (nats), ``accuracy`` (right or not)."""

        def measure(batch: Tensor) -> Tensor:
            logits, labels = model(batch).flatten(0, 1).float(), batch[:, 1:].flatten()
            losses = F.cross_entropy(logits, labels, reduction="none")
            return torch.stack([losses, logits.argmax(dim=-1) == labels])

        model.eval()
        return dict(zip(self.metrics, self._of_every_token(measure, device), strict=True))

    def _of_every_token(self, measure: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """What ``measure`` finds of each batch of validation sequences [B, L], with the tokens along the last axis."""
        every = self.data.validation.split(self.evaluation_batch)
        parts = [measure(ids.long().to(device)).cpu() for ids in own_share(every)]
        return torch.cat(merged(parts, len(every)), dim=-1)


def gathered_model(teacher: LanguageModel, config: Mapping, data: Corpus) -> tuple[LanguageModel, list[dict]]:
    """The student right after gathering, and the rows of :func:`ones_lib.checkpoints.convert.convert`.

    The config's method is a gathering, or one of the controls :data:`ones_lib.integration.FRESH`: new networks in place of the MoE
    layers. Its ``options`` are the method's and ``convert``'s. ``reconstruct`` among them is a number of tokens of the corpus.
    """
    method, options = config["method"], dict(config["options"])
    if method not in (*gathering_methods(), *FRESH):
        raise ValueError(f"method: expected one of {[*gathering_methods(), *FRESH]}, found {method!r}")
    moe, length = config["teacher"]["model"], data.train.shape[1]
    options["calibration"] = _spaced(data.train, config["calibration_examples"] * length)
    options.setdefault("d_ff", moe.get("dense_width"))
    if "reconstruct" in options:
        options["reconstruct"] = _spaced(data.train, options["reconstruct"])
    with TemporaryDirectory() as folder, without_bars():
        source, destination = located(moe.get("checkpoint", "")), Path(folder, "dense")
        if not source:
            source = Path(folder, "moe")
            teacher.model.save_pretrained(source)
        table = convert(source, destination, "topk" if method in FRESH else method, **options)
        model = load_language_model(destination, dtype=torch.float32)
    if method in FRESH:
        _put_in_fresh(model, table["layer"], config["seed"], zero=method == "zero_ffn")
        table["output_error"] = 1.0 if method == "zero_ffn" else float("nan")
    return LanguageModel(model), table.to_dict("records")


def _spaced(blocks: Tensor, tokens: int) -> Tensor:
    """So many tokens of blocks [n, L]: of many blocks every i-th, as in all records so far; see :func:`thinned`."""
    count = max(1, tokens // blocks.shape[1])
    every = len(blocks) // count  # what is left out at the end is less than 1 / every of all blocks
    return blocks[::every][:count] if every >= 16 else thinned(blocks, tokens)


def _put_in_fresh(model: PreTrainedModel, layers: Iterable[str], seed: int, zero: bool) -> None:
    """Put newly initialised networks in the place of the gathered ones; ``zero``: with an output of zero, which can still learn."""
    generator = torch.Generator().manual_seed(seed)
    places = tuple(f"{block_of(layer)}.mlp." for layer in layers)
    for name, tensor in model.named_parameters():
        if name.startswith(places):
            fresh = torch.randn(tensor.shape, generator=generator) * model.config.initializer_range
            tensor.data.copy_(torch.zeros_like(tensor) if zero and "down_proj" in name else fresh)
