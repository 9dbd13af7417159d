"""The MoE types of transformers and how each is made dense.

Nearly all of it is derived from a type's configuration and an empty model: where the experts are, which configuration makes all
layers dense or leaves one expert, what is joined and what is copied. The tables here hold what can't be: dense classes to prefer,
refusals, and config keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import PreTrainedConfig as Config
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ones_lib.checkpoints.layers import LINEAR, Gates, computes, ffn_parts, gates_of, has_row_per_expert, router_fill
from ones_lib.checkpoints.quantised import without_quantization
from ones_lib.models.causal import (
    REFUSALS,
    activation_of,
    block_of,
    empty_model,
    experts_modules,
    has_input_gates,
    refusal,
    text_config,
)

DENSE_CLASS, DENSE_LAYERS, ONE_EXPERT = "dense class", "dense layers", "one expert"
ENGINES = ("vllm",)  # that some classes need another twin for

# Names in configs: of the number of experts, of experts a token, of widths, of groups of experts.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_GROUPS = ("n_group", "topk_group")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Of the number of layers that predict further tokens, or whether there are any. No twin has their weights.
_FURTHER_TOKENS = re.compile(
    r"^(use_mtp|num_(nextn_predict|mtp)_(layers|modules)|mtp_(num_hidden|transformer)_layers)$"
)
_TRIAL = 72  # a width that no published model has
_ROUND = 8  # hidden units of an expert are a multiple of this
# Values that make every layer of n dense, for types that have the first of their names; the others are for engines.
_ALL_DENSE: list[Callable[[int], dict]] = [
    lambda n: {"mlp_layer_types": ["dense"] * n, "first_k_dense_replace": n},
    lambda n: {"first_k_dense_replace": n},
    lambda n: {"num_dense_layers": n},
    lambda n: {"mlp_only_layers": list(range(n))},
    lambda n: {"expert_layer_period": n + 1, "expert_layer_offset": n},
    lambda n: {"moe_layers": [], "interleave_moe_layer_step": 0},
]


@dataclass(frozen=True)
class Special:
    """What can't be derived of a type.

    Args:
        twin: model type of a dense class with the same attention, norms and names.
        changes: values of its config that differ.
        site: module of the MoE layer, and its name in the dense class, where that differs.
        shared: name of shared experts that stand beside the MoE layer in the block.
        streams: whether all that a block gets of the one before are its hidden states.
        mean_gated: the shared expert's gate, which depends on the token, becomes its mean. Not exact.
        approximation: for a twin that is a plain dense class, but not exact.
        with_experts: engines that refuse the class without any MoE layer.
        refuse: reason why a config can't be converted, or an empty string.
    """

    twin: str = ""
    changes: Callable[[Config], dict] = lambda config: {}
    site: tuple[str, str] = ("", "")
    shared: str = ""
    streams: bool = True
    mean_gated: bool = False
    approximation: Special | None = None
    with_experts: tuple[str, ...] = ()
    refuse: Callable[[Config], str] = lambda config: ""


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _qwen3_layers(config: Config) -> dict:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return {"layer_types": [kind] * config.num_hidden_layers, "head_dim": _head_dim(config)}


def _lfm2_sizes(config: Config) -> dict:
    """The width as it is, and two names that published configs have and vLLM reads."""
    return {"block_auto_adjust_ff_dim": False, "block_dim": config.hidden_size, "conv_dim": config.hidden_size}


_QWEN2 = Special(
    "qwen2",
    mean_gated=True,
    refuse=lambda config: (
        "" if config.qkv_bias else "Qwen2 has biases of queries, keys and values, this model has none"
    ),
)

_GRANITE = {"changes": lambda config: {"mlp_bias": False}, "site": ("block_sparse_moe", "mlp")}

# Blocks hand on more than hidden states: chosen tokens, keys and values, states of the router or of a loop.
_STATEFUL = [
    "inkling2",
    "inkling2_text",
    "zaya",
    "diffusion_gemma",
    "gemma4",
    "gemma4_text",
    "glm5_next",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl",
    "hy_v4_vl_text",
    "inkling2_loop",
    "inkling2_loop_text",
    "mistral_large4",
    "mistral_large4_text",
]

#: By model type. A type that is not here has nothing special.
SPECIAL: dict[str, Special] = {
    "mixtral": Special("mistral"),
    "qwen2_moe": Special(approximation=_QWEN2),
    "qwen3_moe": Special("qwen3", _qwen3_layers),
    "flex_olmo": Special("olmo2"),
    "granitemoe": Special("granite", **_GRANITE),
    "granitemoeshared": Special("granite", **_GRANITE, shared="shared_mlp"),
    "ernie4_5_moe": Special("ernie4_5", lambda config: {"head_dim": _head_dim(config)}),
    "granitemoe_swa": Special("granite_swa", **_GRANITE, shared="shared_mlp"),
    "hunyuan_v1_moe": Special("hunyuan_v1_dense"),
    "aria_text": Special("llama"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite"), Special(with_experts=("vllm",))),
    "lfm2_moe": Special("lfm2", _lfm2_sizes),
    "qwen3_vl_moe": Special("qwen3_vl"),
    "qwen3_vl_moe_text": Special("qwen3_vl_text"),
    **dict.fromkeys(_STATEFUL, Special(streams=False)),
    "switch_transformers": Special(
        "t5",
        lambda config: {"feed_forward_proj": config.dense_act_fn},
        ("mlp", "DenseReluDense"),
        refuse=lambda config: "" if config.tie_word_embeddings else "T5 has an output layer tied to its embeddings",
    ),
}
#: Types that are not converted, with the reason.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("vitpose", "vitpose_backbone"), "its experts are one for each data set, chosen by the user: there is no router"
    ),
    **dict.fromkeys(
        ("inkling_mm_model", "inkling_text"),
        "its shared experts have gates of the same softmax as the routed ones, which depend on the token",
    ),
    **dict.fromkeys(
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        "tokens of text and of images have experts of their own, of different widths",
    ),
    "dbrx": "its experts and its configuration have an older form that no other type has, and that is not read here",
    "doge": "its experts are single neurons, found by product keys, and no feed-forward networks",
    "jetmoe": "its attention has experts too, and their number a token is the number of its heads",
    "longcat_flash": "its router also chooses experts that return their input, with gates that depend on the token",
    "nllb-moe": "in transformers, only the first two experts of a layer ever run, whatever the router chooses",
}


def moe_types() -> Iterator[str]:
    """The model types of the installed transformers whose config, or a part of it, has a number of experts."""
    return (kind for kind, config in CONFIG_MAPPING.items() if _has_experts(config))


def _has_experts(config: type[Config]) -> bool:
    names = {*getattr(config, "__dataclass_fields__", {}), *config.attribute_map}
    parts = {part for part in config.sub_configs.values() if issubclass(part, Config)}
    if len(parts) < len(config.sub_configs):  # some can be of several types: take the default
        with suppress(ValueError, TypeError, StrictDataclassError):
            parts |= {type(getattr(config(), name)) for name in config.sub_configs} - {type(None)}
    return any(name in names for name in _COUNTS) or any(_has_experts(part) for part in parts - {config})


class Architecture:
    """How the MoE of a config is made dense.

    ``kind`` is what its dense twin is: a ``"dense class"``; the MoE's own class with ``"dense layers"``; or that with
    ``"one expert"``, whose gate is constant. Where a class can't have just one, for its router or for the width of its shared
    experts, the twin has a few, which are always chosen, and the hidden units are spread over them.

    Args:
        config: the MoE's.
        source: its name in errors.
        approximate: take the approximation, see :class:`Special`.
        engine: make a twin that this engine starts; one of :data:`ENGINES`, or empty.

    Raises:
        ValueError: there is no twin; names ``source`` and the reason.
    """

    def __init__(self, config: Config, source: str | Path, approximate: bool = False, engine: str = "") -> None:
        self.config, self.source = without_quantization(config), source
        for part in {id(part): part for part in (self.config, text_config(self.config))}.values():
            for name in (
                "auto_map",
                "transformers_weights",
            ):  # the twin has no code of its own, nor files with other names
                if hasattr(part, name):
                    delattr(part, name)
        kind = config.model_type
        self.special = SPECIAL.get(kind, Special())
        if kind in REFUSED:
            raise ValueError(f"{source}: {kind} has no dense twin: {REFUSED[kind]}")
        if approximate and self.special.approximation is None:
            raise ValueError(f"approximate: expected False for {kind}, which has no approximation")
        self.special = self.special.approximation if approximate else self.special
        self.for_engine = engine if engine in self.special.with_experts else ""
        if reason := self.special.refuse(config):
            raise ValueError(f"{source}: no dense twin for this {kind}: {reason}")
        try:
            self.model = empty_model(self.config)
        except REFUSALS as error:
            if not (Path(source) / "config.json").is_file():
                raise
            raise refusal(source, error, empty_model) from error
        self.experts = self.text_experts(self.model)
        if not self.experts:
            raise ValueError(f"{source}: expected a model with experts, found {type(self.model).__name__} without")
        self.name = next(iter(self.experts))
        self._known: dict[tuple, Gates] = {}
        self._least, self._shared_width, self._shared_count = 1, 0, ""  # see spread
        self.kind, self._changes, self._width = self._find_twin()

    # --- what the MoE is ----------------------------------------------------------------------------------------------

    @staticmethod
    def text_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
        """The modules of routed experts of the language model, by name."""
        text = text_config(model.config)
        found = experts_modules(model)
        own = {name: module for name, module in found.items() if getattr(module, "config", text) is text}
        return own or found

    @property
    def experts_a_token(self) -> int:
        """k, the number of experts that a token is sent to."""
        return max(gates.chosen for gates in self.gates.values())

    def site(self, experts: str) -> str:
        """The module of an MoE layer, by that of its experts."""
        return experts.rpartition(".")[0]

    def shared(self, experts: str) -> str:
        """Module of the shared experts that every token of a layer passes through; empty if none or several."""
        if self.special.shared:
            return f"{block_of(experts)}.{self.special.shared}"
        site = self.model.get_submodule(self.site(experts))
        found = [name for name, child in site.named_children() if "shared" in name and ffn_parts(child)]
        return f"{self.site(experts)}.{found[0]}" if len(found) == 1 else ""

    @property
    def streams(self) -> bool:
        """Whether the model can be run block by block, see :class:`ones_lib.checkpoints.stream.BlockStream`."""
        return self.special.streams and not self.config.is_encoder_decoder

    @property
    def input_gates(self) -> bool:
        """Whether gates multiply the experts' inputs. Then the twin has their mean there, which is not exact."""
        return has_input_gates(self.experts[self.name])

    @property
    def normed(self) -> bool:
        """Whether each expert's output is normed, so that it is not what its weights alone compute."""
        return getattr(self.experts[self.name], "has_post_expert_norm", False)

    @cached_property
    def gates(self) -> dict[str, Gates]:
        """By module of experts. Layers of the same classes have the same."""
        return {name: self._gates(self.model, name, False) for name in self.experts}

    def _gates(self, model: PreTrainedModel, experts: str, blank: bool) -> Gates:
        """:func:`gates_of`, once for all layers that are alike in classes and settings.

        Raises:
            ValueError: the layer can't be run by itself.
        """
        if self.input_gates:
            return Gates(None, (), getattr(text_config(self.config), self._canonical(_CHOSEN)), 1.0, "")
        key = blank, tuple(_settings(module) for module in model.get_submodule(self.site(experts)).modules())
        if key not in self._known:
            try:
                self._known[key] = gates_of(model, experts, blank)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                raise ValueError(
                    f"{self.source}: {experts}: expected an MoE layer that can be run by itself, found {error!r}"
                ) from error
        return self._known[key]

    # --- what it becomes ----------------------------------------------------------------------------------------------

    def _find_twin(self) -> tuple[str, dict, str]:
        """The kind, what changes in the config, and the name of the width there."""
        if self.special.twin:
            return DENSE_CLASS, self.special.changes(text_config(self.config)), "intermediate_size"
        text = text_config(self.config)
        values, count = text.to_dict(), text.num_hidden_layers
        width = "intermediate_size_mlp" if "intermediate_size_mlp" in values else "intermediate_size"
        for changes in (make(count) for make in _ALL_DENSE if not self.for_engine):
            if next(iter(changes)) in values and self._joinable() and self._are_dense(changes, width):
                return DENSE_LAYERS, changes, width
        for count in (1, 2):
            changes = {self._canonical(_COUNTS): count, self._canonical(_CHOSEN): count}
            changes |= {name: 1 for name in _GROUPS if values.get(name) is not None}
            for width in (name for name in _WIDTHS if name in values):
                if (twin := self._changed(changes | {width: _TRIAL})) is None:
                    continue
                fits = all(_width_of(twin.get_submodule(name)) == _TRIAL for name in self.experts)
                if fits and all(self._constant(twin, name) for name in self.experts):
                    self._least = count
                    self._tie_shared(twin, changes | {width: _TRIAL})
                    return ONE_EXPERT, changes, width
        raise ValueError(
            f"{self.source}: no dense twin for this {self.config.model_type}: no config makes its layers dense, or leaves"
            " one or two experts with constant gates"
        )

    def _constant(self, twin: PreTrainedModel, experts: str) -> bool:
        """Whether the gates of a twin with one expert are the same for every token, and none is zero."""
        try:
            return min(self.one_gate(twin, experts), default=0) > 0
        except ValueError:  # a router that can't choose of so few
            return False

    def _tie_shared(self, twin: PreTrainedModel, changes: Mapping) -> None:
        """Note whether the width of shared experts depends on an expert's, which ``changes`` have set, and on their number."""
        values = text_config(self.config).to_dict()
        site = self.site(self.name)
        for child, module in self.model.get_submodule(site).named_children():
            if "shared" not in child or not ffn_parts(module):
                continue
            place, width = f"{site}.{child}", _width_of(module)
            if (narrow := _width_of(twin.get_submodule(place))) != width:
                self._shared_width = width
                for count in (name for name in _SHARED if name in values):
                    more = self._changed({**changes, count: values[count] + 1})
                    if more is not None and _width_of(more.get_submodule(place)) > narrow:
                        self._shared_count = count

    def spread(self, width: int) -> tuple[int, int]:
        """Number of experts in a twin of the kind one expert, and hidden units of each: ``width`` in all, or a few more.

        The grouped matrix products of torch want rows of 16 bytes, so of 8 units. Where the shared experts' width must be a
        multiple of an expert's, it takes the fewest experts without more units, else with at most a tenth more, if any. The
        product, given as the width, gives itself.
        """
        if not self._shared_width:
            return self._least, _ROUND * -(-width // (_ROUND * self._least))
        widths = [w for w in range(1, self._shared_width + 1) if self._shared_width % w == 0]
        widths = [w for w in widths if w % _ROUND == 0] or widths
        if not self._shared_count:
            widths = [self._shared_width]
        found = [(max(self._least, -(-width // w)), w) for w in widths]
        for most in (width, 1.1 * width):
            if near := [(count, w) for count, w in found if count * w <= most]:
                return min(near)
        return min(found, key=lambda pair: (pair[0] * pair[1], pair[0]))

    def _joinable(self) -> bool:
        """Whether the layers hold nothing but router, experts, and shared experts that compute what an expert does."""
        for name in self.experts:
            site = self.model.get_submodule(self.site(name))
            others = [child for child, module in site.named_children() if "shared" in child]
            others = [f"{self.site(name)}.{child}" for child in others]
            activation = activation_of(self.experts[name])
            if len(others) > 1 or any(not computes(self.model.get_submodule(o), activation) for o in others):
                return False
            if any("norm" in child or "proj" in child for child, _ in site.named_children()):
                return False
        return True

    def _are_dense(self, changes: dict, width: str) -> bool:
        """Whether ``changes`` make MoE layers dense, computing what an expert does, and change nothing else."""
        twin = self._changed(changes | {width: _TRIAL})
        if twin is None or self.experts.keys() & experts_modules(twin).keys():
            return False
        sites = {self.site(name): activation_of(module) for name, module in self.experts.items()}
        inside = tuple(f"{site}." for site in sites)
        outside = [[name for name in model.state_dict() if not name.startswith(inside)] for model in (self.model, twin)]
        networks = {twin.get_submodule(site): activation for site, activation in sites.items()}
        return outside[0] == outside[1] and all(
            _width_of(network) == _TRIAL and computes(network, activation) for network, activation in networks.items()
        )

    def _canonical(self, names: tuple[str, ...]) -> str:
        """The first of the names that the config has, as it is stored."""
        text = text_config(self.config)
        found = next((name for name in names if hasattr(text, name)), names[0])
        return text.attribute_map.get(found, found)

    def _changed(self, changes: Mapping) -> PreTrainedModel | None:
        """The MoE's own class, empty, with other values of the language model's config; None if it can't be."""
        values = self.config.to_dict()
        text, part = values, self.config
        for name in ("thinker_config", "text_config"):
            if text_config(self.config) is not part and isinstance(text.get(name), dict):
                text, part = text[name], getattr(part, name)
        text.update(changes)
        try:
            return empty_model(type(self.config).from_dict(values))
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError, StrictDataclassError):
            return None

    def twin(self, width: int) -> PreTrainedModel:
        """The twin, empty, with feed-forward networks of ``width``.

        Raises:
            ValueError: a value that both configs have would be lost.
        """
        if self.kind != DENSE_CLASS:
            twin = self._changed({**self._changes, **self._sizes(width)})
        else:
            kind = CONFIG_MAPPING[self.special.twin]
            config = self._dense_config(self.config, kind, {**self._changes, self._width: width})
            if type(self.model) is MODEL_MAPPING[type(self.config)]:  # a model without a head
                config.architectures = [MODEL_MAPPING[kind].__name__]
            twin = empty_model(config)
        twin = _without_further_tokens(twin)
        twin.config.architectures = [type(twin).__name__]
        return twin

    def _sizes(self, width: int) -> dict[str, int]:
        """Values of the config of the MoE's own class that depend on the width."""
        if self.kind != ONE_EXPERT:
            return {self._width: width}
        count, each = self.spread(width)
        sizes = {self._canonical(_COUNTS): count, self._canonical(_CHOSEN): count, self._width: each}
        return sizes | ({self._shared_count: self._shared_width // each} if self._shared_count else {})

    def _dense_config(self, config: Config, kind: type[Config], changes: dict) -> Config:
        """A config of the dense class, or a part of it: values that both classes have, and the changes of the language model's."""
        text = text_config(self.config)
        parts = {name: part for name, part in kind.sub_configs.items() if config is not text and hasattr(config, name)}
        if config is not text:
            changes = {name: self._dense_config(getattr(config, name), part, changes) for name, part in parts.items()}
        width = "d_ff" if "d_ff" in (known := kind().to_dict()) else "intermediate_size"
        changes = {name if name != "intermediate_size" else width: value for name, value in changes.items()}
        own = ("model_type", "architectures", "transformers_version")
        carried = {k: v for k, v in config.to_dict().items() if k in known and k not in own and k not in parts}
        try:
            dense = kind(**carried | changes)
        except REFUSALS as error:
            raise ValueError(
                f"{self.source}: expected values of config.json that {self.special.twin} takes too: {error}"
            ) from error
        found = dense.to_dict()
        if lost := [f"{k} {v}" for k, v in carried.items() if k not in changes and v is not None and found[k] != v]:
            raise ValueError(f"{self.source}: expected values that {self.special.twin} keeps, lost: {lost}")
        return dense

    def target(self, experts: str) -> str:
        """The module of the twin's feed-forward network, by the MoE's module of experts."""
        if self.kind == ONE_EXPERT:
            return experts
        old, new = self.special.site
        site = self.site(experts)
        return f"{site.removesuffix(old)}{new}" if new and site.endswith(old) else site

    def source_name(self, name: str) -> str:
        """The name in the MoE of a tensor or module of the twin that is copied."""
        old, new = self.special.site
        return f"{name}.".replace(f".{new}.", f".{old}.")[:-1] if new and self.kind == DENSE_CLASS else name

    def factor(self, twin: PreTrainedModel, experts: str) -> float:
        """What a gathered network's output is multiplied by in the twin, besides the MoE's sum of gates.

        That is what the MoE layer multiplies its experts' output by, and the twin's, if it has experts, does not.
        """
        factor = self.gates[experts].factor
        if self.kind != ONE_EXPERT:
            return factor
        return factor / self._gates(twin, experts, True).factor

    def one_gate(self, twin: PreTrainedModel, experts: str) -> tuple[float, ...]:
        """The gates of the experts of a twin of the kind one expert."""
        return self._gates(twin, experts, True).each

    def router(self, twin: PreTrainedModel, experts: str) -> dict[str, Tensor]:
        """The tensors of the router of a twin with one expert or a few that depend on their number, filled.

        They differ in shape from the MoE's, or else the number is the same.
        """
        if self.kind != ONE_EXPERT:
            return {}
        old = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        count = twin.get_submodule(experts).num_experts
        same = count == self.experts[experts].num_experts > 1
        site, found = f"{self.site(experts)}.", {}
        for name, tensor in twin.state_dict().items():
            if not name.startswith(site) or name.startswith((f"{experts}.", f"{site}shared")):
                continue
            changed = old.get(name) != tensor.shape or (same and has_row_per_expert(tensor, count))
            if changed or not tensor.is_floating_point():
                found[name] = router_fill(name, torch.empty_like(tensor, device="cpu"))
        return found


def _without_further_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a config that says that no layers predict further tokens; as it was, if its weights depend on that."""

    def without(values: dict) -> dict:
        found = {}
        for name, value in values.items():
            if isinstance(value, int) and value and _FURTHER_TOKENS.search(str(name)):
                value = type(value)(0)
            found[name] = without(value) if isinstance(value, dict) else value
        return found

    values = model.config.to_dict()
    if (changed := without(values)) == values:
        return model
    try:
        other = empty_model(type(model.config).from_dict(changed))
    except REFUSALS:
        return model
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, other)]
    return other if shapes[0] == shapes[1] else model


def _settings(module: nn.Module) -> tuple:
    """A module's class and the numbers and words that it is set to, but for its place."""
    values = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    return type(module).__name__, *sorted((n, v) for n, v in values.items() if n not in ("layer_idx", "training"))


def _width_of(module: nn.Module) -> int:
    """Hidden units of a feed-forward network or of each of a module of experts; 0 if it is none."""
    for name, parameter in module.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if LINEAR.get(last) == ("down",):
            return parameter.shape[-2 if getattr(module, "is_transposed", False) else -1]
    return 0
