"""Knowledge integration: the dense student that a trained MoE becomes (arXiv 2201.10890).

Everything outside the expert layers is copied, every expert layer is gathered into one FFN, the router is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering import check_bank, gather, gathering_methods
from ones_lib.moe import MoEFeedForward

#: Controls that a gathering must be worth more than: (experts, freshly initialised FFN, generator) -> the student's FFN.
CONTROLS: dict[str, Callable[[FeedForwardWeights, FeedForwardWeights, torch.Generator], FeedForwardWeights]] = {
    # Only the shared weights come from the teacher, as when Switch Transformers are distilled (arXiv 2101.03961, 4.2).
    "shared_kd": lambda bank, fresh, generator: fresh,
    # Output zero: what is left of the teacher without its experts. Only the read-out is zero, so that it can still learn.
    "zero_ffn": lambda bank, fresh, generator: FeedForwardWeights(
        **{name: torch.zeros_like(t) if name.startswith("down") else t for name, t in fresh.tensors()}
    ),
    "one_expert": lambda bank, fresh, generator: bank.expert(
        int(torch.randint(bank.num_experts, (), generator=generator))
    ),
}


@dataclass(frozen=True)
class IntegrationReport:
    """What :func:`integrate` did, one row a parameter: ``parameter, action, shape, source_shape``.

    ``action`` is ``copied``, ``gathered``, ``replaced`` (by a control, which gathers nothing) or ``dropped`` (``shape`` is
    None then).
    """

    method: str
    rows: list[dict]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["parameter", "action", "shape", "source_shape"])

    def __str__(self) -> str:
        parts = []
        for action, group in self.table().groupby("action", sort=False):
            sizes = [torch.Size(shape).numel() for shape in group["source_shape"]]
            parts.append(f"{len(group)} tensors ({sum(sizes):,} weights) {action}")
        return f"{self.method}: {', '.join(parts)}"


def integrate(
    teacher: nn.Module, method: str = "svd", *, seed: int = 0, **options
) -> tuple[nn.Module, IntegrationReport]:
    """The dense student of an MoE teacher, before distillation, and a report of where each weight came from.

    Args:
        teacher: a model with :class:`MoEFeedForward` layers and a method ``dense_twin(d_ff)``, such as ``WideNet``.
        method: a gathering method or one of the controls ``shared_kd``, ``zero_ffn``, ``one_expert``.
        seed: of the controls' random choices.
        options: the gathering method's.

    Raises:
        ValueError: no MoE layer in the teacher, unknown method, or what :func:`ones_lib.gathering.gather` refuses.
    """
    if method not in [*gathering_methods(), *CONTROLS]:
        raise ValueError(f"method: expected one of {[*gathering_methods(), *CONTROLS]}, found {method!r}")
    layers = {name: m for name, m in teacher.named_modules() if isinstance(m, MoEFeedForward) and m.num_experts > 1}
    if not layers:
        raise ValueError(
            f"teacher: expected at least one MoE layer with 2 experts or more, found none in {type(teacher).__name__}"
        )

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        like = next(iter(layers.values())).up  # for dtype and device
        if method in CONTROLS:
            if options:
                raise TypeError(f"{next(iter(options))}: control {method!r} takes no options")
            student = teacher.dense_twin().to(like)
            gathered = {}
            for name, layer in layers.items():
                check_bank(layer.bank())
                fresh = student.get_submodule(name).bank().expert(0)
                gathered[name] = CONTROLS[method](layer.bank(), fresh, generator)
        else:
            gathered = {name: gather(layer.bank(), method, **options) for name, layer in layers.items()}
            student = teacher.dense_twin(d_ff=next(iter(gathered.values())).d_ff).to(like)

        rows, source = [], dict(teacher.named_parameters()) | dict(teacher.named_buffers())
        target = dict(student.named_parameters()) | dict(student.named_buffers())
        for name, tensor in source.items():
            layer_name, _, part = name.rpartition(".")
            if layer_name in gathered:
                target[name].copy_(getattr(gathered[layer_name], part)[None])
                action = "replaced" if method in CONTROLS else "gathered"
            elif layer_name.removesuffix(".router") in gathered:
                action = "dropped"
            else:
                target[name].copy_(tensor)
                action = "copied"
            shape = None if action == "dropped" else tuple(target[name].shape)
            rows.append({"parameter": name, "action": action, "shape": shape, "source_shape": tuple(tensor.shape)})
    return student, IntegrationReport(method, rows)
