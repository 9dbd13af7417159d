"""The fast form of :func:`ones_lib.moe.dispatch_plain`: sends tokens to their experts, and adds up what comes back.

Only speed depends on this module. N is the number of tokens, E of experts, k of experts per token, h = d_ff, d = d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ones_lib.ffn import FeedForwardWeights

if TYPE_CHECKING:
    from ones_lib.moe import Routing

#: Up to this many multiplications, :func:`dispatch` runs all experts on all tokens. On two CPU cores, sorting and grouping
#: cost more than that.
SMALL = 2**21
#: Above this many hidden activations (16 MB in float32) they do not stay in a CPU's cache.
LARGE = 2**22


def dispatch(bank: FeedForwardWeights, x: Tensor, routing: Routing, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``y = sum_{i in top-k} gate_i * FFN_i(x)`` for tokens ``x`` [N, d] -> [N, d], in one of three ways:

    - Small sizes (up to :data:`SMALL` multiplications, N*E*h*d): every expert runs on every token in batched products. The
      gates, most of them zero, select.
    - Otherwise the assignments are sorted by expert, and each matrix is multiplied in one grouped product
      (``torch.nn.functional.grouped_mm``). It does only the work of the assignments.
    - Expert by expert over the sorted tokens, if there is no grouped product for the dtype, the sizes or the device. Also on
      a CPU without gradients above :data:`LARGE` hidden activations: one expert's activations then stay in the cache.
    """
    num_tokens, num_experts = len(x), bank.num_experts
    dropping = routing.capacity is not None and routing.capacity < num_tokens  # an expert gets a token at most once
    if not dropping and num_tokens * bank.up.numel() <= SMALL:
        output = _products(bank, x.expand(num_experts, -1, -1), activation, batched_linear)  # [E, N, d]
        gates = routing.gates.new_zeros(num_tokens, num_experts).scatter(1, routing.experts, routing.gates)
        return (gates.T[..., None] * output).sum(dim=0).to(x.dtype)

    expert, order = routing.experts.T.flatten().sort(
        stable=True
    )  # [k*N]: all first choices, then all second choices, ...
    ids = torch.arange(num_experts, device=x.device)
    if dropping:
        position = torch.arange(len(expert), device=x.device) - torch.searchsorted(expert, ids).index_select(0, expert)
        kept = position < routing.capacity
        expert, order = expert[kept], order[kept]
    ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # [E]: where each expert's rows end
    token = order % num_tokens
    rows = x.index_select(0, token)  # its backward pass is much faster than that of x[token]

    cached = not torch.is_grad_enabled() and x.device.type == "cpu" and len(rows) * bank.d_ff > LARGE
    if cached or not _can_group(bank, x):
        parts = zip(bank.experts(), rows.tensor_split(ends[:-1].tolist()), strict=True)
        output = torch.cat([ffn.apply(part, activation) for ffn, part in parts])
    else:
        grouped = partial(_grouped_linear, expert=expert, ends=ends)
        output = _products(bank, rows, activation, grouped)
    gates = routing.gates.T.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, (gates * output).to(x.dtype))


def _products(bank: FeedForwardWeights, x: Tensor, activation: Callable, linear: Callable) -> Tensor:
    """The experts' outputs, with ``linear(x, weight, bias)`` as the product with each of the bank's matrices."""
    hidden = linear(x, bank.up, bank.up_bias)
    hidden = activation(hidden) if bank.gate is None else activation(linear(x, bank.gate, bank.gate_bias)) * hidden
    return linear(hidden, bank.down, bank.down_bias)


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[E, n, in] -> [E, n, out] with one weight [E, out, in] per expert."""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, expert: Tensor, ends: Tensor) -> Tensor:
    """[n, in] -> [n, out] with weight [E, out, in]. Rows are sorted by their ``expert`` [n] and end at ``ends`` [E]."""
    dtype = _product_dtype(x)
    grouped_mm = F.grouped_mm if dtype == torch.bfloat16 else _uncompiled_grouped_mm
    y = grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)
    return y if bias is None else y + bias.index_select(0, expert).to(dtype)


# torch.compile supports grouped_mm only in bfloat16.
_uncompiled_grouped_mm = torch.compiler.disable(F.grouped_mm)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``. ``grouped_mm`` does not follow autocast by itself."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _can_group(bank: FeedForwardWeights, x: Tensor) -> bool:
    """Whether ``grouped_mm`` supports the dtype, the row sizes (multiples of 16 bytes) and the device (CPU, or GPU from Ampere
    on)."""
    dtype = _product_dtype(x)
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (bank.d_model, bank.d_ff))
    runs = x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))
    return runs and aligned and dtype in (torch.float32, torch.bfloat16, torch.float16)
