"""How long an MoE and its dense student take, what the arithmetic would say, and how fast the ways of dispatch are."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward, Router, Routing, batched_linear, dispatch, dispatch_plain
from ones_lib.study.training import default_device

LEAST_BLOCKS = 5
BLOCK_SECONDS = 0.02  # what is shorter is timed several times in a row
LARGEST_COPY = 2**30  # bytes of weights that transformers' batched_mm may copy: one expert's an assignment
MODES = ("eager", "compiled")


def dispatch_one_hot(
    bank: FeedForwardWeights,
    x: Tensor,
    routing: Routing,
    activation: Callable[[Tensor], Tensor],
    *,
    group_size: int,
    capacity_factor: float = 1.2,
) -> Tensor:
    """Dispatch by products with one-hot tensors [G, S, E, C], as in GShard (arXiv 2006.16668, algorithm 1) and the MoEs of
    its time, WideNet's among them.

    Tokens [N, d] form G groups of ``group_size`` S; an expert takes at most ``ceil(capacity_factor * k * S / E)`` = C
    assignments of a group, first choices first, and what is over it adds nothing.
    """
    (num_tokens, d), top_k, num_experts = x.shape, routing.experts.shape[1], bank.num_experts
    if num_tokens % group_size:
        raise ValueError(f"group_size: expected a divisor of the {num_tokens} tokens, found {group_size}")
    groups = num_tokens // group_size
    capacity = math.ceil(capacity_factor * top_k * group_size / num_experts)
    chosen = F.one_hot(routing.experts.view(groups, group_size, top_k), num_experts)  # [G, S, k, E]
    in_order = chosen.transpose(1, 2).flatten(1, 2)  # [G, k*S, E]: all first choices stand first
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
    """Dispatch by the experts of transformers: ``eager``, a loop over them; ``batched_mm``, a product with a copy of an expert's
    weights for every assignment; or ``grouped_mm``.

    Of transformers' experts those of Nemotron-H are plain ones. They have no biases, so ``bank``, of parameters, must have
    none; the activation is GELU.
    """
    num_experts, d_ff, d_model = bank.up.shape
    sizes = {"n_routed_experts": num_experts, "hidden_size": d_model, "moe_intermediate_size": d_ff}
    rest = {"moe_latent_size": None, "mlp_hidden_act": "gelu", "_experts_implementation": implementation}
    with torch.device("meta"):
        experts = NemotronHExperts(SimpleNamespace(**sizes, **rest))
    experts.up_proj, experts.down_proj = bank.up, bank.down
    return lambda bank, x, routing, activation: experts(x, routing.experts, routing.gates)


def measure_dispatch(
    name: str, layer: Mapping[str, int], batch_sizes: Iterable[int], precisions: Iterable[str], seconds: float
) -> pd.DataFrame:
    """Time of one MoE layer's experts by way of dispatch, forward and with backward, on the same weights and routing.

    Weights are random, without biases. So is the routing, with an offset an expert (SD 0.5 of a logit) that makes some busier
    than others; gates sum to 1. Nothing is dropped but by ``one_hot``, which cannot do without a capacity.

    Columns ``layer, variant, precision, direction, batch_size, median_ms, low_ms, high_ms`` (quartiles), ``measured`` (blocks
    of passes, the variants taking turns), ``device, threads``. Variants: ``ours``, :func:`ones_lib.moe.dispatch`; ``loop``, its
    plain form; ``one_hot``, :func:`dispatch_one_hot` with an example a group; and :func:`transformers_dispatch`'s three.

    Args:
        layer: ``d_model, d_ff, num_experts, top_k`` and ``tokens`` an example.
        precisions: names of torch's dtypes.
        seconds: at least that long for each number, and at least 5 blocks.
    """
    device, rows = default_device(), []
    d_model, d_ff, num_experts, top_k = (layer[key] for key in ("d_model", "d_ff", "num_experts", "top_k"))
    cases = [(precision, batch_size) for precision in precisions for batch_size in batch_sizes]
    for precision, batch_size in tqdm(cases, desc=name):
        about = {"layer": name, "precision": precision, "batch_size": batch_size}
        dtype, generator = getattr(torch, precision), torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0, dtype=dtype, draw=generator) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(shape, generator=draw)).to(device, dtype))

        up, down = ((num_experts, d_ff, d_model), (num_experts, d_model, d_ff))
        bank = FeedForwardWeights(random(*up, scale=d_model**-0.5), random(*down, scale=d_ff**-0.5))
        x, offsets = random(batch_size * layer["tokens"], d_model), 0.5 * torch.randn(num_experts, generator=generator)
        logits = torch.randn(len(x), num_experts, generator=generator) + offsets
        probabilities = logits.softmax(dim=-1).to(device)
        gates, experts = probabilities.topk(top_k, dim=-1)
        gates = nn.Parameter((gates / gates.sum(dim=-1, keepdim=True)).to(x.dtype))
        routing = Routing(experts, gates, probabilities)

        variants = {"ours": dispatch, "loop": dispatch_plain}
        variants["one_hot"] = partial(dispatch_one_hot, group_size=layer["tokens"])
        copies = 2 * len(x) * top_k * bank.up[0].nbytes
        names = ["eager", "grouped_mm"] + (["batched_mm"] if copies <= LARGEST_COPY else [])
        variants |= {i: transformers_dispatch(i, bank) for i in names}
        forward = {v: partial(function, bank, x, routing, F.gelu) for v, function in variants.items()}
        leaves, gradient = [x, gates, bank.up, bank.down], torch.ones_like(x)
        both = {v: partial(_backward, function, leaves, gradient) for v, function in forward.items()}
        with torch.inference_mode():
            times = {("forward", v): t for v, t in _in_turns(forward, seconds).items()}
        times |= {("forward and backward", v): t for v, t in _in_turns(both, seconds).items()}
        rows += [{**about, "direction": way, "variant": v, **_summary(t)} for (way, v), t in times.items()]
    return pd.DataFrame(rows).assign(**_where(device))


def measure_speed(
    name: str,
    moe: nn.Module,
    batch_sizes: Iterable[int],
    seconds: float,
    precisions: Iterable[str] = ("float32",),
    modes: Sequence[str] = ("eager",),
) -> pd.DataFrame:
    """Time of a forward pass of an image MoE and of its dense student at each batch size, in evaluation, on the accelerator if
    there is one; one row a variant.

    Columns ``model, variant, precision, mode, batch_size, median_ms, low_ms, high_ms`` (quartiles of ``measured`` blocks of
    passes, the variants taking turns), ``images_per_second, parameters, flops, weight_bytes, peak_mb, device, threads``.
    Variants: ``dense``; ``moe`` as this library runs it; ``moe_plain``, a loop over experts; ``moe_gshard``, see
    :func:`dispatch_one_hot`, with one group an image. ``flops`` are those of a pass that does no more than it must: the dense
    model's as counted, and the MoE's with its k experts and the router in the FFN's place. ``weight_bytes`` are those of all
    weights that a pass uses, at every depth anew if they are shared, and of an MoE's experts those that got a token.
    ``peak_mb`` (eager) is the most memory that a pass holds beside weights and input.

    Args:
        moe: a model of :mod:`ones_lib.models.images`; weights do not matter, but for how evenly the router spreads tokens.
        seconds: at least that long for each number, and at least 5 blocks.
        precisions: names of torch's dtypes.
        modes: ``eager``, ``compiled`` (:func:`torch.compile`, one graph a batch size), or both.
    """
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"modes: expected of {MODES}, found {sorted(unknown)}")
    device, rows = default_device(), []
    moe, dense = moe.eval().to(device), moe.dense_twin().eval().to(device)
    tokens = moe.patch_embed.num_patches + moe.num_prefix_tokens
    channels, size = moe.patch_embed.proj.in_channels, moe.patch_embed.img_size
    one_hot = partial(dispatch_one_hot, group_size=tokens)
    ways = {"moe": dispatch, "moe_plain": dispatch_plain, "moe_gshard": one_hot}
    models = {"dense": dense} | {variant: _dispatching(moe, way) for variant, way in ways.items()}
    flops = _flops(moe, dense, torch.randn(1, channels, *size, device=device))
    cases = [(p, m, b) for p in precisions for m in modes for b in batch_sizes]
    for precision, mode, batch_size in tqdm(cases, desc=name):
        about = {"model": name, "precision": precision, "mode": mode, "batch_size": batch_size}
        x = torch.randn(batch_size, channels, *size, device=device).to(getattr(torch, precision))
        passes = {variant: partial(model.to(x.dtype), x) for variant, model in models.items()}
        if mode == "compiled":
            torch.compiler.reset()
            del passes["moe_plain"]  # which rows an expert gets is known only on the way: no graph
            passes = {v: partial(torch.compile(models[v], dynamic=False), x) for v in passes}
        with torch.inference_mode():
            used = {kind: _weight_bytes(models[kind], x) for kind in ("dense", "moe")}
            peaks = {variant: _peak_bytes(run, device) for variant, run in passes.items()} if mode == "eager" else {}
            times = _in_turns(passes, seconds)
        for variant, of_variant in times.items():
            found, kind = _summary(of_variant), "dense" if variant == "dense" else "moe"
            found["images_per_second"] = 1000 * batch_size / found["median_ms"]
            found["parameters"] = sum(p.numel() for p in models[variant].parameters())
            found["flops"] = batch_size * flops[kind]
            found["weight_bytes"] = used[kind]
            found["peak_mb"] = peaks[variant] / 1e6 if peaks else math.nan
            rows.append({**about, "variant": variant, **found})
    return pd.DataFrame(rows).assign(**_where(device))


def available_modes(modes: Sequence[str]) -> list[str]:
    """Those of ``modes`` that can be had here: ``torch.compile`` needs a compiler, and says so if it has none."""
    found = list(modes)
    if "compiled" in found:
        try:
            torch.compile(torch.sin)(torch.ones(8, device=default_device()))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            found.remove("compiled")
            warnings.warn(f"modes: torch.compile does not run here, so without it: {error}", stacklevel=2)
    return found


def _where(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
    return {"device": name, "threads": torch.get_num_threads()}


def _backward(forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(forward(), leaves, gradient)


def _in_turns(functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Tensor]:
    """Seconds a call, a number for each block of calls. All take their turns, so that what changes on the way, of the
    machine or of its memory, meets them alike."""
    timers, calls, times = {}, {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        timers[name] = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        calls[name] = math.ceil(BLOCK_SECONDS / timers[name].timeit(1).median)
    started = time.perf_counter()
    while min(map(len, times.values())) < LEAST_BLOCKS or time.perf_counter() - started < seconds * len(functions):
        for name, timer in timers.items():
            # timeit warms up twice each time, which long calls need not.
            long = partial(timer.blocked_autorange, min_run_time=2 * BLOCK_SECONDS)
            times[name] += (long() if calls[name] == 1 else timer.timeit(calls[name])).times
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in times.items()}


def _summary(seconds: Tensor) -> dict[str, float]:
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.quantile(1000 * seconds, quartiles).tolist()
    return {"median_ms": median, "low_ms": low, "high_ms": high, "measured": len(seconds)}


def _dispatching(moe: nn.Module, way: Callable[..., Tensor]) -> nn.Module:
    """A copy whose layers dispatch in this way."""
    moe = deepcopy(moe)
    for layer in moe.moe_layers():
        layer.dispatch = way
    return moe


def _flops(moe: nn.Module, dense: nn.Module, x: Tensor) -> dict[str, int]:
    """Operations that a pass of ``x`` takes at least."""
    # The fused attention of some devices is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dense(x)
    layer = moe.moe_layers()[0]
    tokens = len(x) * (moe.patch_embed.num_patches + moe.num_prefix_tokens)
    passed = 2 * tokens * len(moe.blocks)  # every depth, shared weights or not
    more = (layer.router.top_k - 1) * 2 * layer.up[0].numel() + layer.router.weight.numel()
    return {"dense": counter.get_total_flops(), "moe": counter.get_total_flops() + passed * more}


def _weight_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the weights that a pass uses, each time that it does; of experts those of the ones that are chosen."""
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
    """The most memory that a call holds beside what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of each start and stop as of an error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())
