"""Loads and runs causal and encoder-decoder language models of transformers."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from ones_lib.calibration import Activation, LayerActivations
from ones_lib.ffn import GatedActivation

# Which of a type's classes is meant where its config doesn't say. A causal one is a composite model's text alone.
_CLASSES = [
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_MAPPING,
]
#: Names in a config of how a model is run: no part of what it is.
SWITCHES = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
SWITCHES |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict"}
SWITCHES |= {"use_cache", "torchscript"}
#: What transformers raises for values of a config that it can't use.
REFUSALS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError)
REFUSALS = (*REFUSALS, ImportError, StrictDataclassError)


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError: it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def model_config(source: str | Path) -> PreTrainedConfig:
    """The config of the model in a folder, or of a hub name. All that opens a checkpoint's config.json does so here.

    Left out are keys that say how to run a model, such as an attention that is not installed. A ``dtype`` may be named as torch
    prints it; ``"auto"`` is none.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON object, its type is none that transformers has, or transformers refuses a value; names the key.
    """
    values = _config_values(source)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:  # else transformers would look for code in the folder
        raise ValueError(
            f"{source}: expected a model type that transformers {version('transformers')} has, found {kind!r}"
        )
    try:
        return _config_of(values, source)
    except REFUSALS as error:
        raise refusal(source, error, lambda config: None) from error


def _config_values(source: str | Path) -> dict:
    """What is in config.json, but for what :func:`model_config` leaves out."""
    folder = Path(source)
    path = folder / "config.json"
    if folder.is_dir() and not path.is_file():
        raise FileNotFoundError(f"{folder}: expected config.json, found {sorted(p.name for p in folder.iterdir())[:8]}")
    if folder.is_dir():
        read_json(path)  # its errors name the file in one line
    return _plain(PreTrainedConfig.get_config_dict(str(source))[0])


def _plain(values: dict) -> dict:
    found = {}
    for name, value in values.items():
        dtype = name in ("dtype", "torch_dtype") and isinstance(value, str)
        if name in SWITCHES or (dtype and value == "auto"):
            continue
        name = "quantization_config" if name == "compression_config" else name  # as llm-compressor once wrote it
        plain = _plain(value) if isinstance(value, dict) else value
        found[name] = value.removeprefix("torch.") if dtype else plain
    return found


def _config_of(values: dict, source: str | Path) -> PreTrainedConfig:
    kind = values["model_type"]
    if kind == "mistral" and "layer_types" in values:  # as AutoConfig does
        kind = "ministral"
    return CONFIG_MAPPING[kind].from_dict({**deepcopy(values), "model_type": kind, "name_or_path": str(source)})


def refusal(source: str | Path, error: Exception, use: Callable[[PreTrainedConfig], object]) -> ValueError:
    """An error in one line, for one that ``use`` of a config has raised. It names file and key to blame."""
    values = _config_values(source)

    def works(values: dict) -> bool:
        try:
            use(_config_of(values, source))
        except REFUSALS:
            return False
        return True

    keys, value = _culprit(values, works), values
    for key in keys:
        value = value[key]
    found = f"{'.'.join(keys)}: expected a value that transformers takes, found {reprlib.repr(value)}: " if keys else ""
    said = re.sub(r"\s*\n\s*", " ", str(error) or type(error).__name__)
    return ValueError(f"{Path(source) / 'config.json'}: {found}{said}")


def _culprit(values: dict, works: Callable[[dict], bool]) -> list[str]:
    """The key without which values work, and what of its own value is to blame; empty: none alone."""
    for name in values:
        if name != "model_type" and works({key: value for key, value in values.items() if key != name}):
            return [name, *_culprit_in(name, values, works)]
    return []


def _culprit_in(name: str, values: dict, works: Callable[[dict], bool]) -> list[str]:
    if not isinstance(values[name], dict):
        return []
    return _culprit(values[name], lambda part: works({**values, name: part}))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's model, such as MixtralForCausalLM.

    Raises:
        ValueError: the type has none: it is only a part of other models.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
            return found
    for mapping in _CLASSES[1 if text_config(config) is not config else 0 :]:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"{config.model_type}: expected a type that has a model class, found a part of other models")


def new_model(config: PreTrainedConfig, **options) -> PreTrainedModel:
    """A model with new weights. ``options``: ``dtype``."""
    return model_class(config)._from_config(config, **options)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, on the device ``meta``, in eval mode."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return new_model(config).eval()


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model in a composite one; any other config itself."""
    thinker = getattr(config, "thinker_config", None)  # Qwen-Omni's
    return (config if thinker is None else thinker).get_text_config()


def load_language_model(folder: str | Path, **options) -> PreTrainedModel:
    """The language model in a folder, in eval mode, in the dtype of its files, which have to be safetensors.

    Weights in FP8 or MXFP4 are dequantised. ``options`` are those of ``from_pretrained``.
    """
    config = model_config(folder)
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method")
    if quantization and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ValueError(f"{folder}: expected weights that transformers can dequantise, found quant_method {method!r}")
    if method in ("fp8", "mxfp8", "mxfp4"):  # else on a GPU its activations would be quantised too
        quantization["dequantize"] = True
    # With peft, transformers would load an adapter that lies beside the weights; in another folder there is none.
    options = {"dtype": "auto", "use_safetensors": True, "adapter_kwargs": {"subfolder": "no adapter"}, **options}
    return with_odd_experts(model_class(config).from_pretrained(folder, config=config, **options).eval())


def with_odd_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose experts run one after the other if torch can't multiply them together: it wants rows of 16 bytes."""
    for experts in experts_modules(model).values():
        stacked = [t for t in experts.parameters() if t.ndim == 3]
        if any(size * t.element_size() % 16 for t in stacked for size in t.shape[1:]):
            model.set_experts_implementation("eager")
            break
    return model


def model_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a model for blocks [B, L]. An encoder-decoder reads the first half, continues with the second."""
    ids = ids.long()
    if "decoder_input_ids" not in signature(model.forward).parameters:
        return {"input_ids": ids}
    source, target = ids.tensor_split(2, dim=1)
    return {"input_ids": source, "decoder_input_ids": target}


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihoods, in nats, of the tokens ``ids`` [B, L] that logits [B, L, vocabulary] predict, all but the first."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


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


def if_float16(dtype: torch.dtype) -> str:
    """What to do where numbers have grown too large, to be put behind an error."""
    return "; save the MoE in bfloat16, which has larger numbers, and take that" if dtype == torch.float16 else ""


def block_of(name: str) -> str:
    """The transformer block of a tensor or module, such as ``model.layers.3``; empty for embeddings and the like."""
    found = re.match(r"(?:.*?\.)?(?:layers|blocks?)\.\d+", name)
    return found[0] if found else ""


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the routed experts of an MoE layer, by name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if name.split(".")[-1] == "experts" and hasattr(m, "num_experts")}


def activation_of(experts: nn.Module) -> Activation:
    """The activation of a module of routed experts."""
    gate = getattr(experts, "_apply_gate", None)
    if (
        gate is None
        or not getattr(experts, "has_gate", True)
        or gate.__func__.__module__ == "transformers.integrations.moe"
    ):
        one = experts if hasattr(experts, "act_fn") else next(experts.children())  # each may be a module of its own
        return next(getattr(one, name) for name in ("act_fn", "act", "activation_fn") if hasattr(one, name))

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        both = (gate, up)
        return experts._apply_gate(
            torch.cat(both, dim=-1)
            if getattr(experts, "is_concatenated", True)
            else torch.stack(both, dim=-1).flatten(-2)
        )

    return GatedActivation(gated)


def has_input_gates(experts: nn.Module) -> bool:
    """Whether gates multiply the inputs of a module of experts, not their outputs, as Llama 4's do."""
    return len(signature(experts.forward).parameters) == 1


def gates_by_expert(chosen: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Gates [N, E] of what experts are called with: the indices of the chosen [N, k] and their gates [N, k]."""
    if chosen.ndim == 3:  # Switch: one-hot [N, 1, E], zero for tokens beyond the capacity
        return (chosen.to(weights) * weights[..., None]).sum(dim=1)
    return weights.new_zeros(len(weights), num_experts).scatter_add(1, chosen, weights)


@contextmanager
def watched_experts(model: nn.Module, see: Callable[[str, LayerActivations], None]) -> Iterator[None]:
    """While the model runs, call ``see(experts, activations)`` with what passes through every MoE layer.

    The activations are those of the routed experts, without shared ones, and without a factor that the layer multiplies
    their output by. ``experts`` is the name of their module, such as ``model.layers.3.mlp.experts``.
    """

    routed: dict[
        str, tuple[Tensor, Tensor]
    ] = {}  # of experts with gates at their inputs: the layer's inputs, and gates [N, E]

    def see_router(experts: str) -> Callable:
        return lambda module, inputs, output: routed.update({experts: (inputs[0], output[0])})

    def see_experts(experts: str, activation: Activation) -> Callable:
        def see_layer(module: nn.Module, inputs: tuple, kwargs: dict, output: Tensor) -> None:
            if experts in routed:
                x, gates = routed.pop(experts)
                output = output.view(module.num_experts, *x.shape).sum(dim=0)
            else:
                x, chosen, weights = (*inputs, *kwargs.values())
                gates = gates_by_expert(chosen, weights, module.num_experts)
            see(experts, LayerActivations(*(t.detach() for t in (x, gates.to(x), output)), activation))

        return see_layer

    hooks = []
    for name, module in experts_modules(model).items():
        hooks.append(module.register_forward_hook(see_experts(name, activation_of(module)), with_kwargs=True))
        if has_input_gates(module):
            router = model.get_submodule(f"{name.removesuffix('experts')}router")
            hooks.append(router.register_forward_hook(see_router(name)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
