"""The MoE architectures of transformers that can be made dense, and what becomes of each: one table, :data:`ARCHITECTURES`.

To add one, write an entry: its dense class (or its own, with one expert), the configuration's name for an expert's width,
what a token's gates sum to, and what else differs. How its experts are stored is known to :mod:`ones_lib.checkpoints.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

Config = PreTrainedConfig


def _where_normalised(config: Config) -> float | None:
    return 1.0 if config.norm_topk_prob else None


def _scaled_where_normalised(config: Config) -> float | None:
    return config.routed_scaling_factor if config.norm_topk_prob else None


@dataclass(frozen=True)
class Architecture:
    """What becomes of an MoE class of transformers.

    Args:
        twin: model type of the dense class, or its own.
        width: the configuration's name of an expert's hidden neurons.
        gates: what a token's gates sum to, scaling factor included; None: it differs from token to token, so it is measured.
        changes: of the twin's configuration, which otherwise has the same values as the MoE's.
        shared: module of the experts that every token passes through, without a gate: joined to the gathered one.
        mean_gated: module of such an expert with a gate that depends on the token, which the twin replaces by its mean.
        one_expert: the twin is the same class with one expert, whose gate is 1: these are its router's tensors, as (name,
            width of the model or 1), which are then zero. ``kept`` are modules of the layer that the twin has too.
        interleaved: the twin's experts are stored as GPT-OSS's.
        names: of the feed-forward network's matrices.
        rename: what the module that holds it is called in the MoE and in the twin.
        weights_alone: its experts' function is not ``down(act(gate) * up)``, so methods that compute it can't be used.
        approximation: what becomes of it where the twin need not be exact.
        refuse: why a configuration can't be converted, if so.
    """

    twin: str
    width: str
    gates: Callable[[Config], float | None] = lambda config: 1.0
    changes: Callable[[Config], dict] = lambda config: {}
    shared: str = ""
    mean_gated: str = ""
    one_expert: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    interleaved: bool = False
    names: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    rename: tuple[str, str] = ("", "")
    weights_alone: bool = False
    approximation: Architecture | None = None
    refuse: Callable[[Config], str] = lambda config: ""


def _all_dense(config: Config) -> dict:
    """Settings of a class whose first layers are dense, and with these all of them."""
    extra = {name: 0 for name in ("num_nextn_predict_layers", "num_mtp_layers") if hasattr(config, name)}
    return {"first_k_dense_replace": config.num_hidden_layers, **extra}


def _one_expert(config: Config) -> dict:
    return {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _qwen3_layers(config: Config) -> dict:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return {"layer_types": [kind] * config.num_hidden_layers, "head_dim": _head_dim(config)}


_QWEN2 = Architecture(
    "qwen2",
    "moe_intermediate_size",
    _where_normalised,
    mean_gated="shared_expert",
    refuse=lambda config: (
        "" if config.qkv_bias else "Qwen2 has biases of queries, keys and values, this model has none"
    ),
)
_SHARED = {"gates": _scaled_where_normalised, "changes": _all_dense, "shared": "shared_experts"}

#: By model type.
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture("mistral", "intermediate_size", rename=("block_sparse_moe", "mlp")),
    "qwen2_moe": Architecture(
        "qwen2_moe",
        "moe_intermediate_size",
        _where_normalised,
        _one_expert,
        one_expert=("gate.weight",),
        kept=("shared_expert", "shared_expert_gate"),
        approximation=_QWEN2,
    ),
    "qwen3_moe": Architecture("qwen3", "moe_intermediate_size", _where_normalised, _qwen3_layers),
    "olmoe": Architecture("olmoe", "intermediate_size", _where_normalised, _one_expert, one_expert=("gate.weight",)),
    "flex_olmo": Architecture("olmo2", "intermediate_size", _where_normalised),
    # In transformers its gates are never normalised, whatever norm_topk_prob says.
    "deepseek_v2": Architecture("deepseek_v2", "moe_intermediate_size", **_SHARED | {"gates": lambda config: None}),
    "deepseek_v3": Architecture("deepseek_v3", "moe_intermediate_size", **_SHARED),
    "glm4_moe": Architecture("glm4_moe", "moe_intermediate_size", **_SHARED),
    "granitemoe": Architecture(
        "granite",
        "intermediate_size",
        changes=lambda config: {"mlp_bias": False},
        rename=("block_sparse_moe", "mlp"),
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5",
        "moe_intermediate_size",
        changes=lambda config: {"head_dim": _head_dim(config)},
        shared="shared_experts",
    ),
    # Clamped gates, and 1 added to up: of averages, chosen neurons and cut matrices that is the same function as of any other
    # weights, so one expert of its own class is exact.
    "gpt_oss": Architecture(
        "gpt_oss",
        "intermediate_size",
        changes=lambda config: {"num_local_experts": 1, "num_experts_per_tok": 1},
        one_expert=("router.weight", "router.bias"),
        interleaved=True,
        weights_alone=True,
    ),
    "switch_transformers": Architecture(
        "t5",
        "d_ff",
        gates=lambda config: None,
        changes=lambda config: {"feed_forward_proj": config.dense_act_fn},
        names={"up": "wi", "down": "wo"},
        rename=("mlp", "DenseReluDense"),
        refuse=lambda config: "" if config.tie_word_embeddings else "T5 has an output layer tied to its embeddings",
    ),
}
REFUSED = {
    "phimoe": "its router always adds two experts, so that one expert's gate can't be 1, and transformers has no dense class"
    " with its layer norms and biases",
}


def architecture_of(config: Config, source: Path, approximate: bool = False) -> Architecture:
    """The entry for a checkpoint's configuration; ValueError, naming ``source`` and the reason, where there can be none."""
    kind = config.model_type
    if kind in REFUSED:
        raise ValueError(f"{source}: {kind} has no dense twin: {REFUSED[kind]}")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{source}: expected an MoE of type {', '.join(ARCHITECTURES)}, found {kind!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source}: expected weights that are not quantised, found quantization_config in config.json; load the model"
            " with transformers, dequantised, and save it first"
        )
    found = ARCHITECTURES[kind]
    if approximate and found.approximation is None:
        raise ValueError(f"approximate: expected False for {kind}, whose twin is exact")
    found = found.approximation if approximate else found
    if reason := found.refuse(config):
        raise ValueError(f"{source}: no dense twin for this {kind}: {reason}")
    return found


def twin_config(config: Config, architecture: Architecture, width: int) -> Config:
    """The dense twin's configuration with feed-forward networks of ``width``: every value that both classes know, and the
    entry's changes."""
    twin = CONFIG_MAPPING[architecture.twin]
    known = twin().to_dict()
    carried = {k: v for k, v in config.to_dict().items() if k in known and k not in ("model_type", "architectures")}
    own = architecture.one_expert or architecture.twin == "t5"
    return twin(**carried | architecture.changes(config) | {architecture.width if own else "intermediate_size": width})
