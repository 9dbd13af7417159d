"""The MoE architectures of transformers that can be made dense: the table :data:`ARCHITECTURES`.

To add one, write an entry. How experts are stored is in :mod:`ones_lib.checkpoints.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers import PreTrainedConfig as Config


def _if_normalised(config: Config) -> float | None:
    return 1.0 if config.norm_topk_prob else None


def _factor_if_normalised(config: Config) -> float | None:
    return config.routed_scaling_factor if config.norm_topk_prob else None


@dataclass(frozen=True)
class Architecture:
    """How an MoE class of transformers is made dense. Its dense class is called the twin.

    Args:
        twin: model type of the twin; may be the MoE's own.
        width: name in the MoE's config of an expert's hidden units.
        gates: sum of a token's gates, scaling factor included. None: it differs between tokens and has to be measured.
        changes: values of the twin's config that differ from the MoE's.
        shared: module of the experts that every token passes through, which are joined to the gathered network.
        mean_gated: whether they have a gate that depends on the token. The twin has its mean instead.
        one_expert: not empty if the twin is the MoE's class with one expert, whose gate is 1: names of its router's
            tensors, which become zero.
        kept: modules of the MoE layer that such a twin keeps.
        gpt_oss: whether the experts are GPT-OSS's. They are stored in their own way (see ``experts``), and they compute
            something else than ``down(act(gate) * up)``, so no method can be used that computes that.
        names: of the matrices of a feed-forward network.
        rename: name in the MoE, and in the twin, of the module that holds the feed-forward network.
        approximation: another entry, for a twin that is not exact.
        normed: whether a block norms its FFN's output before it adds it.
        sigmoid: whether the router's probabilities are sigmoids of its logits; else their softmax.
        refuse: reason why a config cannot be converted, or an empty string.
    """

    twin: str
    width: str
    gates: Callable[[Config], float | None] = lambda config: 1.0
    changes: Callable[[Config], dict] = lambda config: {}
    shared: str = ""
    mean_gated: bool = False
    one_expert: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    gpt_oss: bool = False
    names: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    rename: tuple[str, str] = ("", "")
    approximation: Architecture | None = None
    normed: bool = False
    sigmoid: bool = False
    refuse: Callable[[Config], str] = lambda config: ""


def _all_dense(config: Config) -> dict:
    """For classes whose first layers are dense: all are."""
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
    _if_normalised,
    shared="shared_expert",
    mean_gated=True,
    refuse=lambda config: (
        "" if config.qkv_bias else "Qwen2 has biases of queries, keys and values, this model has none"
    ),
)
_DEEPSEEK = {"gates": _factor_if_normalised, "changes": _all_dense, "shared": "shared_experts"}

#: By model type.
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture("mistral", "intermediate_size", rename=("block_sparse_moe", "mlp")),
    "qwen2_moe": Architecture(
        "qwen2_moe",
        "moe_intermediate_size",
        _if_normalised,
        _one_expert,
        one_expert=("gate.weight",),
        kept=("shared_expert", "shared_expert_gate"),
        approximation=_QWEN2,
    ),
    "qwen3_moe": Architecture("qwen3", "moe_intermediate_size", _if_normalised, _qwen3_layers),
    "olmoe": Architecture("olmoe", "intermediate_size", _if_normalised, _one_expert, one_expert=("gate.weight",)),
    "flex_olmo": Architecture("olmo2", "intermediate_size", _if_normalised, normed=True),
    # Transformers never normalises its gates, whatever norm_topk_prob says.
    "deepseek_v2": Architecture("deepseek_v2", "moe_intermediate_size", **_DEEPSEEK | {"gates": lambda config: None}),
    "deepseek_v3": Architecture("deepseek_v3", "moe_intermediate_size", **_DEEPSEEK, sigmoid=True),
    "glm4_moe": Architecture("glm4_moe", "moe_intermediate_size", **_DEEPSEEK, sigmoid=True),
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
    # Its experts clamp gate and up and add 1 to up. They do that to gathered weights as to any others, so one expert of its own
    # class is exact.
    "gpt_oss": Architecture(
        "gpt_oss",
        "intermediate_size",
        changes=lambda config: {"num_local_experts": 1, "num_experts_per_tok": 1},
        one_expert=("router.weight", "router.bias"),
        gpt_oss=True,
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
    """The entry for a checkpoint's config.

    Raises:
        ValueError: there is none, or the config is refused; names ``source`` and the reason.
    """
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
    """The twin's config with feed-forward networks of ``width``: values that both classes have, and the changes."""
    twin = CONFIG_MAPPING[architecture.twin]
    known = twin().to_dict()
    carried = {k: v for k, v in config.to_dict().items() if k in known and k not in ("model_type", "architectures")}
    own = architecture.one_expert or architecture.twin == "t5"
    return twin(**carried | architecture.changes(config) | {architecture.width if own else "intermediate_size": width})
