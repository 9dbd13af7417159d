"""How long an MoE and its dense student take for a batch, and what the arithmetic would say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import Routing, batched_linear, dispatch, dispatch_plain

LEAST_RUNS = 5


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


def measure_speed(name: str, moe: nn.Module, batch_sizes: list[int], seconds: float) -> pd.DataFrame:
    """Time of a forward pass of an image MoE and of its dense student at each batch size, in evaluation, on the accelerator if
    there is one; one row a variant.

    Columns ``model, variant, batch_size, median_ms, low_ms, high_ms`` (quartiles of ``measured`` times), ``parameters, flops,
    device, threads``. Variants: ``dense``; ``moe`` as this library runs it; ``moe_plain``, a loop over experts; ``moe_gshard``, see
    :func:`dispatch_one_hot`, with one group an image. ``flops`` are those of a pass that does no more than it must: the
    dense model's as counted, and the MoE's with its k experts and the router in the FFN's place.

    Args:
        moe: a model of :mod:`ones_lib.vision`; weights do not matter, but for how evenly the router spreads tokens.
        seconds: at least that long for each measurement, and at least 5 times.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    moe, dense = moe.eval().to(device), moe.dense_twin().eval().to(device)
    layers, tokens = moe.moe_layers(), moe.patch_embed.num_patches + moe.num_prefix_tokens
    channels, size = moe.patch_embed.proj.in_channels, moe.patch_embed.img_size
    one_hot = partial(dispatch_one_hot, group_size=tokens)
    variants = {"dense": (dense, None), "moe": (moe, dispatch)}
    variants |= {"moe_plain": (moe, dispatch_plain), "moe_gshard": (moe, one_hot)}
    rows = []
    for batch_size in batch_sizes:
        x = torch.randn(batch_size, channels, *size, device=device)
        # The fused attention of some devices is not counted.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            dense(x)
        layer, flops = layers[0], counter.get_total_flops()
        passed = 2 * batch_size * tokens * len(moe.blocks)  # every depth, shared weights or not
        of_an_expert, of_the_router = 2 * layer.up[0].numel(), layer.router.weight.numel()
        moe_flops = flops + passed * ((layer.router.top_k - 1) * of_an_expert + of_the_router)
        for variant, (model, function) in variants.items():
            if function is not None:
                for layer in layers:
                    layer.dispatch = function
            timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads())
            with torch.inference_mode():
                model(x)
                started = time.perf_counter()
                model(x)
                once = time.perf_counter() - started
                # Means of blocks of passes where they are short, else of single ones.
                times = timer.blocked_autorange(min_run_time=max(seconds, LEAST_RUNS * once)).times
            quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            low, median, high = torch.quantile(1000 * torch.tensor(times, dtype=torch.float64), quartiles).tolist()
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "batch_size": batch_size,
                    "median_ms": median,
                    "low_ms": low,
                    "high_ms": high,
                    "measured": len(times),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "flops": flops if variant == "dense" else moe_flops,
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper(),
                    "threads": torch.get_num_threads(),
                }
            )
    return pd.DataFrame(rows)
