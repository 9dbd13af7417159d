"""The cost of a study, before it is run: ``run_all.sh --dry-run``.

Trainings whose steps cost the same form a group. For one of each group the data is opened, a batch of each split is read, the
models are built, and one step on a few examples is made by the code of the real training. FLOPs and memory are counted on the
way, and hours are estimated from them.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import tqdm

from ones_lib.checkpoints.terminal import exit_status, one_line
from ones_lib.data import evaluation_keys
from ones_lib.distillation import Distillation
from ones_lib.models.causal import empty_model, model_config
from ones_lib.moe import Router
from ones_lib.study.inputs import located
from ones_lib.study.running import Config, build_model, data_of, task_of
from ones_lib.study.training import Task, Training, default_device, fit

EXAMPLES = 2  # in the step; mixup needs an even number
#: Dense bfloat16 TFLOPS and GB of memory, from the vendors' data sheets.
CARDS = {"A100 80GB": (312, 80), "H100 SXM": (989, 80), "H200": (989, 141), "L40S": (362, 48), "MI300X": (1307, 192)}
UTILISATION = 0.35  # assumed fraction of a card's peak; replace it by a measurement of the first hundred steps
USABLE = 0.9  # fraction of a card's memory


def grouped_flops(a: list[int], b: list[int], *_, **__) -> int:
    """FLOPs of ``grouped_mm`` from its operands' shapes; PyTorch's counter does not know the operation."""
    return 2 * math.prod(a) * b[-1]  # each row of one operand meets one matrix, or each pair of rows once


@dataclass(frozen=True)
class Trial:
    """The cost of one training step.

    Args:
        parameters: of the model; ``teacher_parameters`` of its teacher.
        flops: per example, forward and backward pass and the teacher's forward pass.
        fixed_bytes: weights, gradients, optimizer, moving average, teacher, and what a forward pass stores for any number of
            examples, such as weights in the precision of matrix products.
        activation_bytes: stored per example for the backward pass.
    """

    parameters: int
    teacher_parameters: int
    flops: float
    fixed_bytes: float
    activation_bytes: float


# --- groups of trainings ---------------------------------------------------------------------------------------------


def kind_of(config: Config) -> Config:
    """The part of a configuration that decides the cost of a step: not seed, gathering method or number of steps."""
    kept = ("domain", "kind", "data", "model", "upcycling", "task", "task_data", "distillation")
    kind = {name: config[name] for name in kept if name in config}
    if config["training"] is not None:
        kind["training"] = {name: v for name, v in config["training"].items() if name not in ("steps", "evaluations")}
    kind["width"] = _width(config)
    for role in ("teacher", "start") if config["kind"] == "finetuned" else ("teacher",):
        if role in config:
            kind[role] = kind_of({**config[role], "training": None})
    return kind


def _width(config: Config) -> dict:
    """The gathering options that set a student's hidden width."""
    return {name: value for name, value in config.get("options", {}).items() if name in ("k", "d_ff")}


def name_of(config: Config) -> str:
    """Short name of a group, for people."""
    if config["kind"] == "finetuned":
        return f"{config['task']}: {name_of(config['start'])}{', KD' if 'distillation' in config else ''}"
    parts, model = [config["kind"].removesuffix("_kd")], config.get("model", {})
    if parts == ["moe"]:
        experts = config.get("upcycling", model).get("num_experts")
        parts = ["moe" if experts is None else f"moe of {experts} experts"]
        parts += ["upcycled"] * ("upcycling" in config) + ["Soft MoE"] * bool(model.get("slots_per_expert"))
    parts += [f"{name} {value}" for name, value in _width(config).items()]
    if "distillation" in config:
        parts.append("KD from " + name_of(config["teacher"]).partition(": ")[2])
        more = {name: config["distillation"].get(name) for name in ("hidden_weight", "augmentations", "router_rate")}
        parts += [f"{name} {value}" for name, value in more.items() if value]
    return f"{config['domain']}: {', '.join(parts)}"


# --- one step --------------------------------------------------------------------------------------------------------


def try_step(config: Config, cache_dir: Path) -> Trial:
    """Read a batch of each split, build the models of a training, count a pass, and make a step."""
    data, task = data_of(config, cache_dir), task_of(config, cache_dir)
    if config["domain"] == "image":  # text is read as a whole when it is opened
        keys = evaluation_keys(len(task.data.val), EXAMPLES)[:1]
        next(iter(task._loader(task.data.val, keys, default_device())))
    _check_memory(config)
    model, teacher, distillation = build_model(config, data), None, None
    if "distillation" in config:
        distillation, teacher = Distillation(**config["distillation"]), build_model(config["teacher"], data)
    recipe = Training(**{**config["training"], "steps": 1, "batch_size": EXAMPLES, "evaluations": 0})
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.capacity_factor = None  # untrained routers overload some experts, which would then drop tokens
    flops = _count_flops(model, teacher, task, recipe) / EXAMPLES
    stored = [_stored_bytes(model, task, replace(recipe, batch_size=n)) for n in (EXAMPLES, 2 * EXAMPLES)]
    activations = (stored[1] - stored[0]) / EXAMPLES
    model, _ = fit(model, task, recipe, seed=0, teacher=teacher, distillation=distillation)
    parameters, teacher_parameters = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (model, teacher))
    each = 16 + (4 if recipe.ema_decay else 0)  # float32: weight, gradient, two moments; moving average
    fixed = each * parameters + 4 * teacher_parameters + max(0.0, stored[0] - EXAMPLES * activations)
    return Trial(parameters, teacher_parameters, flops, fixed, activations)


def _check_memory(config: Config) -> None:
    """Raise MemoryError before a published MoE is loaded that does not fit."""
    published = config.get("teacher", config).get("model", {}).get("checkpoint")
    if published:
        settings = model_config(located(published))
        parameters = sum(p.numel() for p in empty_model(settings).parameters())
        needed, free = 4 * parameters, psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"{published}: expected {needed / 1e9:.0f} GB of free memory, found {free / 1e9:.0f} GB")


def _autocast(recipe: Training) -> torch.autocast:
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision)
    return torch.autocast(default_device().type, precision, enabled=precision is not None)


def _count_flops(model: nn.Module, teacher: nn.Module | None, task: Task, recipe: Training) -> float:
    """FLOPs of a forward and backward pass and the teacher's forward pass."""
    device = default_device()
    (batch,) = task.batches(recipe, 0, 0, device)
    mapping = {torch.ops.aten._grouped_mm: grouped_flops}
    # On some devices the counter does not know fused attention.
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        with _autocast(recipe):
            loss = task.loss(task.forward(model.to(device).train(), batch), batch)
        loss.backward()
        if teacher is not None:
            with torch.no_grad(), _autocast(recipe):
                task.forward(teacher.to(device).eval(), batch)
    model.zero_grad()
    return counter.get_total_flops()


def _stored_bytes(model: nn.Module, task: Task, recipe: Training) -> int:
    """Bytes that a forward pass stores for the backward pass, weights not counted."""
    (batch,) = task.batches(recipe, 0, 0, default_device())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, int] = {}

    def store(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(store, lambda tensor: tensor), _autocast(recipe):
        task.loss(task.forward(model, batch), batch)
    return sum(stored.values())


# --- tables ----------------------------------------------------------------------------------------------------------


def costs(configs: Mapping[str, Config], cache_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """One row per group, ``training, trainings, batch_size, steps`` and the fields of :class:`Trial`; and the errors of groups
    that could not be tried."""
    groups: dict[str, list[Config]] = {}
    for config in configs.values():
        if config["training"] is not None:
            groups.setdefault(json.dumps(kind_of(config), sort_keys=True), []).append(config)
    rows, failed = [], []
    for group in tqdm(groups.values(), desc="one step each", unit="training"):
        first = group[0]
        row = {"training": name_of(first), "trainings": len(group), "batch_size": first["training"]["batch_size"]}
        row["steps"] = sum(config["training"]["steps"] for config in group)
        try:
            rows.append({**row, **asdict(try_step(first, cache_dir))})
        except (OSError, ValueError, RuntimeError, MemoryError, AssertionError) as error:
            failed.append(f"{row['training']}: {type(error).__name__}: {error}")
    return pd.DataFrame(rows), failed


def gpu_hours(table: pd.DataFrame, card: str) -> pd.Series:
    """Hours of each group of trainings on a card, at :data:`UTILISATION` of its peak."""
    flops = table["flops"] * table["batch_size"] * table["steps"]
    return flops / (CARDS[card][0] * 1e12 * UTILISATION) / 3600


def hours_by_card(table: pd.DataFrame) -> pd.DataFrame:
    """For each card the hours of all trainings, and how many examples of the largest model fit at a time."""
    rows = []
    for card, (_, memory) in CARDS.items():
        room = (USABLE * memory * 1e9 - table["fixed_bytes"]) / table["activation_bytes"]
        hours = gpu_hours(table, card).sum()
        rows.append(
            {"card": card, "GPU hours": hours, "GPU days": hours / 24, "examples at a time": max(0, int(room.min()))}
        )
    return pd.DataFrame(rows)


def report(table: pd.DataFrame) -> None:
    """Print the costs, for people."""
    shown = pd.DataFrame(
        {
            "training": table["training"],
            "trainings": table["trainings"],
            "steps in all": table["steps"].map("{:,}".format),
            "batch": table["batch_size"],
            "parameters": (table["parameters"] / 1e6).map("{:.2f}M".format),
            "teacher": (table["teacher_parameters"] / 1e6).map(lambda m: f"{m:.2f}M" if m else ""),
            "GFLOPs an example": (table["flops"] / 1e9).map("{:,.4g}".format),
            "fixed, GB": (table["fixed_bytes"] / 1e9).map("{:.3g}".format),
            "activations, MB an example": (table["activation_bytes"] / 1e6).map("{:,.3g}".format),
            "A100 hours": gpu_hours(table, "A100 80GB").map("{:,.1f}".format),
        }
    )
    total = (table["flops"] * table["batch_size"] * table["steps"]).sum()
    print(shown.to_string(index=False))
    print("\nGFLOPs: forward and backward pass, and the teacher's forward pass.")
    print("Fixed: weights, gradients, optimizer, moving average, teacher.")
    print(f"\nAll {table['trainings'].sum()} trainings: {total:.3g} FLOPs.")
    print(f"At {UTILISATION:.0%} of a card's peak, which is an assumption:\n")
    print(hours_by_card(table).round({"GPU hours": 1, "GPU days": 2}).to_string(index=False))
    print(
        "\nExamples at a time: of the largest training, without --shard. --device-batch accumulates gradients over more."
    )


def main(plan_file: str) -> int:
    """Try what a plan holds and print what it would cost; the exit status is 1 if something could not be tried."""
    return exit_status(lambda: _try_plan(plan_file), lambda error: f"run_all.sh: --dry-run: {one_line(error)}")


def _try_plan(plan_file: str) -> int:
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of a schedule of one step
    plan = json.loads(Path(plan_file).read_text())
    configs, cache_dir = plan["configs"], Path(plan["cache_dir"])
    gathered = sum(config["training"] is None for config in configs.values())
    print(f"\n{len(configs)} models: {len(configs) - gathered} to train, {gathered} gathered or read\n")
    datasets = {json.dumps([config["domain"], config["data"]]): config for config in configs.values()}
    for config in datasets.values():
        print(f"  {data_of(config, cache_dir).report}")
    print(flush=True)
    table, failed = costs(configs, cache_dir)
    if len(table):
        report(table)
    for line in failed:
        print(f"could not be tried: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
