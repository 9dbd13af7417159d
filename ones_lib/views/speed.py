"""Measurements of notebook 05: the time of an MoE and of its dense student, and of ways to dispatch tokens to experts. And of
01 and 03: the time of dense models of two widths."""

from __future__ import annotations

import math
import os
import timeit
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.utils.logging import tqdm

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward, Router, Routing, batched_linear, dispatch, dispatch_plain
from ones_lib.study.onnx_file import check_packages, onnx_program, onnx_session
from ones_lib.study.parameters import SPEED_MODES
from ones_lib.study.records import provenance
from ones_lib.study.running import build_model, calibration_batches, load_record
from ones_lib.study.study import Study
from ones_lib.study.training import default_device

LEAST_BLOCKS = 5  # of calls, for each number
BLOCK_SECONDS = 0.02  # shorter calls are repeated within a block
LARGEST_COPY = 2**30  # bytes of weights that transformers' batched_mm may copy: one expert's for each assignment
LANGUAGE_BATCHES, LANGUAGE_SECONDS, DECODED = [1, 16], 0.2, 16  # sequences; for each number; tokens
WIDTHS_SECONDS = 1.0  # least time for each number of study_widths, which a notebook takes once


# --- ways of dispatch ------------------------------------------------------------------------------------------------


def dispatch_one_hot(
    bank: FeedForwardWeights,
    x: Tensor,
    routing: Routing,
    activation: Callable[[Tensor], Tensor],
    *,
    group_size: int,
    capacity_factor: float = 1.2,
) -> Tensor:
    """Dispatch by products with one-hot tensors [G, S, E, C], as in GShard (arXiv 2006.16668, algorithm 1), WideNet and other
    MoEs of their time.

    Tokens [N, d] form G groups of ``group_size`` = S. An expert takes at most C = ``ceil(capacity_factor * k * S / E)``
    assignments of a group, first choices first; the rest is dropped.
    """
    (num_tokens, d), top_k, num_experts = x.shape, routing.experts.shape[1], bank.num_experts
    if num_tokens % group_size:
        raise ValueError(f"group_size: expected a divisor of the {num_tokens} tokens, found {group_size}")
    groups = num_tokens // group_size
    capacity = math.ceil(capacity_factor * top_k * group_size / num_experts)
    chosen = F.one_hot(routing.experts.view(groups, group_size, top_k), num_experts)  # [G, S, k, E]
    in_order = chosen.transpose(1, 2).flatten(1, 2)  # [G, k*S, E], all first choices first
    position = (in_order.cumsum(dim=1) - 1).view(groups, top_k, group_size, num_experts).transpose(1, 2)
    place = F.one_hot((position * chosen).sum(dim=-1).clamp(max=capacity), capacity + 1)[..., :capacity]  # [G, S, k, C]
    gates = routing.gates.view(groups, group_size, top_k)
    combine = torch.einsum("gsk,gske,gskc->gsec", gates, chosen.to(gates), place.to(gates))
    mask = (combine != 0).to(x)
    buffer = torch.einsum("gsec,gsd->egcd", mask, x.view(groups, group_size, d)).flatten(1, 2)  # [E, G*C, d]
    hidden = activation(batched_linear(buffer, bank.up, bank.up_bias))
    output = batched_linear(hidden, bank.down, bank.down_bias).view(num_experts, groups, capacity, d)
    return torch.einsum("gsec,egcd->gsd", combine, output).reshape(num_tokens, d).to(x.dtype)


def transformers_dispatch(implementation: str, bank: FeedForwardWeights) -> Callable[..., Tensor]:
    """Dispatch by the experts of transformers, of which Nemotron-H's are plain FFNs without biases.

    Args:
        implementation: ``eager``, a loop over experts; ``batched_mm``, a product with a copy of an expert's weights for every
            assignment; or ``grouped_mm``.
        bank: parameters without biases; the activation is GELU.
    """
    num_experts, d_ff, d_model = bank.up.shape
    sizes = {"n_routed_experts": num_experts, "hidden_size": d_model, "moe_intermediate_size": d_ff}
    rest = {"moe_latent_size": None, "mlp_hidden_act": "gelu", "_experts_implementation": implementation}
    with torch.device("meta"):
        experts = NemotronHExperts(SimpleNamespace(**sizes, **rest))
    experts.up_proj, experts.down_proj = bank.up, bank.down
    return lambda bank, x, routing, activation: experts(x, routing.experts, routing.gates)


# --- one MoE layer ---------------------------------------------------------------------------------------------------


def measure_dispatch(
    name: str, layer: Mapping[str, int], batch_sizes: Iterable[int], precisions: Iterable[str], seconds: float
) -> pd.DataFrame:
    """Time of one MoE layer's experts by way of dispatch, forward and with backward, on the same random weights and routing.

    Columns ``layer, precision, batch_size, direction, variant, median_ms, low_ms, high_ms`` (quartiles), ``measured`` (number
    of blocks), ``device, threads``. Variants: ``ours``, :func:`ones_lib.moe.dispatch`; ``loop``, its plain form; ``one_hot``,
    :func:`dispatch_one_hot` with an example a group, the only one that drops tokens; and :func:`transformers_dispatch`'s
    three, without ``batched_mm`` where its copies are too large.

    Args:
        layer: ``d_model, d_ff, num_experts, top_k``, and ``tokens`` of an example.
        precisions: names of torch's dtypes.
        seconds: least time for each number, which also has at least 5 blocks.
    """
    device, rows = default_device(), []
    cases = [(precision, batch_size) for precision in precisions for batch_size in batch_sizes]
    for precision, batch_size in tqdm(cases, desc=name):
        about = {"layer": name, "precision": precision, "batch_size": batch_size}
        bank, x, routing = _random_layer(layer, batch_size, getattr(torch, precision), device)
        ways = _ways_of_dispatch(bank, routing, group_size=layer["tokens"])
        forward = {variant: partial(way, bank, x, routing, F.gelu) for variant, way in ways.items()}
        leaves, gradient = [x, routing.gates, bank.up, bank.down], torch.ones_like(x)
        both = {variant: partial(_backward, function, leaves, gradient) for variant, function in forward.items()}
        with torch.inference_mode():
            times = {"forward": in_turns(forward, seconds)}
        times["forward and backward"] = in_turns(both, seconds)
        for direction, of_direction in times.items():
            for variant, found in of_direction.items():
                rows.append({**about, "direction": direction, "variant": variant, **summary(found)})
    return pd.DataFrame(rows).assign(**_where(device))


def _random_layer(
    layer: Mapping[str, int], batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[FeedForwardWeights, Tensor, Routing]:
    """Experts without biases, tokens, and a routing that is uneven: an offset for each expert, SD 0.5, in the router logits."""
    d_model, d_ff, num_experts = layer["d_model"], layer["d_ff"], layer["num_experts"]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> nn.Parameter:
        return nn.Parameter((scale * torch.randn(shape, generator=generator)).to(device, dtype))

    up = random(num_experts, d_ff, d_model, scale=d_model**-0.5)
    down = random(num_experts, d_model, d_ff, scale=d_ff**-0.5)
    x = random(batch_size * layer["tokens"], d_model)
    offsets = 0.5 * torch.randn(num_experts, generator=generator)
    logits = torch.randn(len(x), num_experts, generator=generator) + offsets
    probabilities = logits.softmax(dim=-1).to(device)
    gates, experts = probabilities.topk(layer["top_k"], dim=-1)
    gates = nn.Parameter((gates / gates.sum(dim=-1, keepdim=True)).to(dtype))
    return FeedForwardWeights(up, down), x, Routing(experts, gates, probabilities)


def _ways_of_dispatch(bank: FeedForwardWeights, routing: Routing, group_size: int) -> dict[str, Callable[..., Tensor]]:
    implementations = ["eager", "grouped_mm"]
    if 2 * routing.experts.numel() * bank.up[0].nbytes <= LARGEST_COPY:
        implementations.append("batched_mm")
    ways = {"ours": dispatch, "loop": dispatch_plain, "one_hot": partial(dispatch_one_hot, group_size=group_size)}
    return ways | {name: transformers_dispatch(name, bank) for name in implementations}


def _backward(forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(forward(), leaves, gradient)


# --- whole models ----------------------------------------------------------------------------------------------------


def measure_speed(
    name: str,
    moe: nn.Module,
    batch_sizes: Iterable[int],
    seconds: float,
    precisions: Iterable[str] = ("float32",),
    modes: Sequence[str] = ("eager",),
) -> pd.DataFrame:
    """Time of a forward pass of an image MoE and of its dense student by batch size, on the accelerator if there is one.

    Columns ``model, precision, mode, batch_size, variant, median_ms, low_ms, high_ms`` (quartiles), ``measured`` (number of
    blocks), ``images_per_second, parameters, flops, weight_bytes, peak_mb, device, threads``. Variants: ``dense``; ``moe``
    as this library runs it; ``moe_plain``, a loop over experts (not compiled); ``moe_gshard``, :func:`dispatch_one_hot`
    with an image a group. ``flops`` of the MoE count the router and each token's k experts in the FFN's place.
    ``weight_bytes`` are those of all weights that a pass reads: shared ones at every depth anew, and of experts only those
    that got a token. ``peak_mb`` (eager only) is the most memory that a pass holds beside weights and input.

    Args:
        moe: a model of :mod:`ones_lib.models.images`. Its weights matter only for how evenly the router spreads tokens.
        seconds: least time for each number, which also has at least 5 blocks.
        precisions: names of torch's dtypes.
        modes: of ``eager``, ``compiled`` (:func:`torch.compile`, one graph a batch size), and ``onnx``: in ONNX Runtime on the
            CPU, in float32, where of the MoE's ways only the loop over experts can be written.
    """
    if unknown := set(modes) - set(SPEED_MODES):
        raise ValueError(f"modes: expected of {SPEED_MODES}, found {sorted(unknown)}")
    device, rows = default_device(), []
    moe, dense = moe.eval().to(device), moe.dense_twin().eval().to(device)
    models = _variants(moe, dense)
    shape = (moe.patch_embed.proj.in_channels, *moe.patch_embed.img_size)
    flops = _flops(moe, dense, torch.randn(1, *shape, device=device))
    parameters = {variant: sum(p.numel() for p in model.parameters()) for variant, model in models.items()}
    cases = [(p, m, b) for p in precisions for m in modes for b in batch_sizes if m != "onnx" or p == "float32"]
    for precision, mode, batch_size in tqdm(cases, desc=name):
        x = torch.randn(batch_size, *shape, device=device).to(getattr(torch, precision))
        for model in models.values():
            model.to(x.dtype)
        with torch.inference_mode():
            weight_bytes = {kind: _weight_bytes(models[kind], x) for kind in ("dense", "moe")}
            passes = _passes(models, x, mode)
            peaks = {variant: _peak_bytes(run, device) for variant, run in passes.items()} if mode == "eager" else {}
            times = in_turns(passes, seconds)
        for variant, of_variant in times.items():
            row = {"model": name, "precision": precision, "mode": mode, "batch_size": batch_size, "variant": variant}
            row |= summary(of_variant)
            kind = "dense" if variant == "dense" else "moe"
            row |= {"images_per_second": 1000 * batch_size / row["median_ms"], "parameters": parameters[variant]}
            row |= {"flops": batch_size * flops[kind], "weight_bytes": weight_bytes[kind]}
            rows.append(row | {"peak_mb": peaks.get(variant, math.nan) / 1e6})
    return pd.DataFrame(rows).assign(**_where(device))


def study_widths(study: Study) -> tuple[pd.DataFrame, str]:
    """:func:`measure_widths` of a study's first MoE, trained, on a batch of its training data, with dense models of one expert's
    width and of the active width; and the name of its record. Taken once on a machine, then found in the records."""
    moe, (one, active) = study.moe(study.seeds[0]), study.widths()

    def measure() -> pd.DataFrame:
        model, task = load_record(study.records.find(moe), study.cache_dir)
        (batch,) = calibration_batches(task, moe["training"], examples=1, device=default_device())
        return measure_widths(model, task.forward, batch, [one, active], WIDTHS_SECONDS)

    config = {"kind": "widths", "what": moe, "how": [one, active, WIDTHS_SECONDS], "device": provenance()["device"]}
    return study.records.table(config, measure if study.allow_training else None)


def measure_widths(
    moe: nn.Module, forward: Callable[[nn.Module, tuple], Tensor], batch: tuple, widths: Iterable[int], seconds: float
) -> pd.DataFrame:
    """Time of a forward pass of an MoE, as this library runs it, and of dense models of other widths; on the accelerator if there
    is one.

    Columns ``d_ff`` (hidden units; none of the MoE), ``batch_size, median_ms, low_ms, high_ms`` (quartiles), ``measured``
    (number of blocks), ``examples_per_second, speedup`` (the MoE's median over the model's), ``device, threads``.

    Args:
        moe: trained, so that its router spreads tokens as it does in use.
        forward: of a task, such as :meth:`ones_lib.study.image_task.ImageClassification.forward`.
        batch: of that task; its first tensor has a row for each example.
        seconds: least time for each number, which also has at least 5 blocks.
    """
    device = default_device()
    models = {math.nan: moe} | {width: moe.dense_twin(d_ff=width) for width in widths}
    passes = {width: partial(forward, model.eval().to(device), batch) for width, model in models.items()}
    with torch.inference_mode():
        times = in_turns(passes, seconds)
    table = pd.DataFrame([{"d_ff": width, "batch_size": len(batch[0]), **summary(t)} for width, t in times.items()])
    table["examples_per_second"] = 1000 * table["batch_size"] / table["median_ms"]
    table["speedup"] = table["median_ms"].iloc[0] / table["median_ms"]
    return table.assign(**_where(device))


def study_language_speed(study: Study, widths: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """:func:`measure_language_speed` of a study's first MoE, trained, and of dense models of ``widths``, as in
    :func:`ones_lib.study.entries.by_name`; and the name of its record. Taken once on a machine, then found in the records."""
    moe, data = study.moe(study.seeds[0]), study.open_data()

    def measure() -> pd.DataFrame:
        models = {"moe": study.load_model(study.records.find(moe)).model}
        for width in widths:
            models[width] = build_model(study.dense(study.seeds[0], d_ff=width), data).model
        return measure_language_speed(models, data.validation, LANGUAGE_BATCHES, LANGUAGE_SECONDS)

    how = [list(widths), LANGUAGE_BATCHES, LANGUAGE_SECONDS]
    config = {"kind": "language_speed", "what": moe, "how": how, "device": provenance()["device"]}
    return study.records.table(config, measure if study.allow_training else None)


def measure_language_speed(
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    batch_sizes: Iterable[int],
    seconds: float,
    decoded: int = DECODED,
    drawn: bool = False,
) -> pd.DataFrame:
    """Tokens a second of causal models in transformers, which take turns, on the accelerator if there is one.

    Columns ``width`` (the model's name), ``phase, batch_size, median_ms, low_ms, high_ms`` (quartiles), ``measured`` (number of
    blocks), ``tokens_per_second, speedup`` (the first model's median over the model's), ``device, threads``. Phases:
    ``prefill``, a forward pass of ``ids``; ``decoding``, ``decoded`` tokens one after the other, with a cache, after a prompt of 8.

    Args:
        ids: token ids [n, L]; with fewer than a batch, all of them.
        seconds: least time for each number, which also has at least 5 blocks.
        drawn: draw tokens; else the likeliest ones are taken, which of random weights become alike.
    """
    device, rows = default_device(), []
    models = {name: model.eval().to(device) for name, model in models.items()}
    decoding = {"min_new_tokens": decoded, "max_new_tokens": decoded, "do_sample": drawn}
    if drawn:
        decoding["top_k"] = 0  # of all tokens
    for batch_size in sorted({min(size, len(ids)) for size in batch_sizes}):
        prompts = ids[:batch_size].long().to(device)
        short = {"input_ids": prompts[:, :8], "attention_mask": torch.ones_like(prompts[:, :8])}
        phases = {
            "prefill": {name: partial(model, prompts, use_cache=False) for name, model in models.items()},
            "decoding": {name: partial(model.generate, **short, **decoding) for name, model in models.items()},
        }
        for phase, passes in phases.items():
            with torch.inference_mode():
                times = in_turns(passes, seconds)
            tokens = batch_size * (decoded if phase == "decoding" else prompts.shape[1])
            for name, found in times.items():
                row = {"width": name, "phase": phase, "batch_size": batch_size, **summary(found)}
                rows.append(row | {"tokens_per_second": 1000 * tokens / row["median_ms"]})
    table = pd.DataFrame(rows)
    first = table.groupby(["phase", "batch_size"])["median_ms"].transform("first")
    return table.assign(speedup=first / table["median_ms"], **_where(device))


def _variants(moe: nn.Module, dense: nn.Module) -> dict[str, nn.Module]:
    """The dense model, and a copy of the MoE for each way of dispatch."""
    tokens = moe.patch_embed.num_patches + moe.num_prefix_tokens
    ways = {"moe": dispatch, "moe_plain": dispatch_plain, "moe_gshard": partial(dispatch_one_hot, group_size=tokens)}
    models = {"dense": dense}
    for variant, way in ways.items():
        models[variant] = deepcopy(moe)
        for layer in models[variant].moe_layers():
            layer.dispatch = way
    return models


def _passes(models: Mapping[str, nn.Module], x: Tensor, mode: str) -> dict[str, Callable[[], Tensor]]:
    if mode == "eager":
        return {variant: partial(model, x) for variant, model in models.items()}
    if mode == "onnx":
        return {variant: _onnx_pass(models[variant], x) for variant in ("dense", "moe_plain")}
    torch.compiler.reset()
    # The plain loop cannot be one graph: the number of rows that an expert gets depends on the data.
    fixed = {variant: model for variant, model in models.items() if variant != "moe_plain"}
    return {variant: partial(torch.compile(model, dynamic=False), x) for variant, model in fixed.items()}


def _onnx_pass(model: nn.Module, x: Tensor) -> Callable[[], object]:
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        example = torch.zeros(2, *x.shape[1:])  # of batches of one, only batches of one would be traced
        onnx_program(model, {"images": example}, ["logits"]).save(file)
        session = onnx_session(file)
    return partial(session.run, None, {"images": x.numpy()})


def available_modes(modes: Sequence[str]) -> list[str]:
    """The ``modes`` that run here. With a warning, ``compiled`` is left out without a compiler for ``torch.compile``, and ``onnx``
    without its packages, or where models run on an accelerator."""
    found = list(modes)
    if "onnx" in found:
        try:
            check_packages()
            if (device := default_device()).type != "cpu":
                raise ImportError(f"ONNX Runtime is timed on a CPU, found {device.type}")
        except ImportError as error:
            found.remove("onnx")
            warnings.warn(f"modes: 'onnx' is left out: {error}", stacklevel=2)
    if "compiled" in found:
        try:
            torch.compile(torch.sin)(torch.ones(8, device=default_device()))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            found.remove("compiled")
            warnings.warn(f"modes: torch.compile does not run here, so it is left out: {error}", stacklevel=2)
    return found


def _where(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
    return {"device": name, "threads": torch.get_num_threads()}


def in_turns(functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Tensor]:
    """Seconds a call, a number for each block of calls; at least 5 blocks, and ``seconds`` for each function.

    The functions take turns, so a change in the machine's speed affects all of them alike.
    """
    calls, times = {}, {}
    for name, function in functions.items():
        function()  # compiles
        once = _seconds(function, 1)
        calls[name] = math.ceil(BLOCK_SECONDS / once)
        times[name] = [once] if calls[name] == 1 else []
    started = _now()
    while min(map(len, times.values())) < LEAST_BLOCKS or _now() - started < seconds * len(functions):
        for name, function in functions.items():
            if calls[name] > 1:
                function()  # fills the cache
            times[name].append(_seconds(function, calls[name]))
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in times.items()}


def _seconds(function: Callable[[], object], calls: int) -> float:
    """Mean time of a call; an accelerator is waited for."""
    return timeit.Timer(function, timer=_now).timeit(calls) / calls


def summary(seconds: Tensor) -> dict[str, float]:
    """Of times [n] in seconds: ``median_ms, low_ms, high_ms`` (quartiles), ``measured``, their number."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.quantile(1000 * seconds, quartiles).tolist()
    return {"median_ms": median, "low_ms": low, "high_ms": high, "measured": len(seconds)}


def _flops(moe: nn.Module, dense: nn.Module, x: Tensor) -> dict[str, int]:
    """Floating-point operations of a pass of ``x``; the MoE's with only what its experts must do."""
    # FlopCounterMode does not count the fused attention of some devices.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dense(x)
    layer = moe.moe_layers()[0]
    tokens = len(x) * (moe.patch_embed.num_patches + moe.num_prefix_tokens)
    weights = (layer.router.top_k - 1) * 2 * layer.up[
        0
    ].numel() + layer.router.weight.numel()  # more than the dense FFN
    more = 2 * tokens * len(moe.blocks) * weights  # at every depth, also if weights are shared
    return {"dense": counter.get_total_flops(), "moe": counter.get_total_flops() + more}


def _weight_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of weights that a pass reads: each module's at every call, and of experts only the chosen ones'."""
    total, hooks, share = 0.0, [], {}

    def used(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal total
        own = sum(p.nbytes for p in module.parameters(recurse=False))
        if isinstance(module, Router):
            share["of_experts"] = len(output.experts.unique()) / len(module.weight)
        total += own * (share["of_experts"] if isinstance(module, MoEFeedForward) and module.num_experts > 1 else 1)

    for module in model.modules():
        hooks.append(module.register_forward_hook(used))
    model(x)
    for hook in hooks:
        hook.remove()
    return round(total)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that a call holds on top of what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs every start and stop as an error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


def _now() -> float:
    """Seconds, when an accelerator has done what it was asked for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return timeit.default_timer()
