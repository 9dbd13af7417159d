"""What a study would cost, before anyone pays for it: ``run_all.sh --dry-run``.

Each kind of training that the notebooks ask for is tried: its data are opened, a batch of both splits is read, its models are
built, and one step is made of few examples, by the same code as the whole. From a pass counted on the way come operations,
memory and hours.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
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
from tqdm import tqdm
from transformers import AutoConfig

from ones_lib.data import evaluation_keys
from ones_lib.distillation import Distillation
from ones_lib.models.causal import model_class
from ones_lib.moe import Router
from ones_lib.study.running import Config, Execution, build_model, frozen, open_data, task_of
from ones_lib.study.training import Task, Training, default_device, fit

EXAMPLES = 2  # of the step that is tried: mixup pairs them
#: Dense bfloat16 TFLOPS and GB of memory, from the makers' data sheets.
CARDS = {"A100 80GB": (312, 80), "H100 SXM": (989, 80), "H200": (989, 141), "L40S": (362, 48), "MI300X": (1307, 192)}
#: Part of a card's peak that such a training reaches; ours, a guess to be replaced by a measurement of the first hundred steps.
UTILISATION = 0.35
USABLE = 0.9  # part of a card's memory


def grouped_flops(a: list[int], b: list[int], *_, **__) -> int:
    """Multiplications and additions of ``grouped_mm``, by the shapes of its operands; PyTorch's counter does not know it."""
    return 2 * math.prod(a) * b[-1]  # each row of one operand meets one matrix, or each pair of rows once


@dataclass(frozen=True)
class Trial:
    """What one step of a training took. ``flops`` and ``activation_bytes`` are of one example; ``fixed_bytes`` are weights,
    gradients, optimizer, moving average, teacher, and what a forward pass keeps of any number of examples, such as weights in
    the precision of its products."""

    parameters: int
    teacher_parameters: int
    flops: float
    fixed_bytes: float
    activation_bytes: float
    step_seconds: float


def kind_of(config: Config) -> Config:
    """What a training shares with those that cost the same a step: all but seed, gathering method and number of steps."""
    kept = {"domain", "kind", "data", "model", "upcycling", "task", "distillation"} & set(config)
    kind = {name: config[name] for name in kept}
    if config["training"] is not None:
        kind["training"] = {name: v for name, v in config["training"].items() if name not in ("steps", "evaluations")}
    if config["kind"] in ("dense", "dense_kd"):
        kind["kind"] = "dense"
    if config["kind"] == "student":
        kind["width"] = {name: config["options"][name] for name in ("k", "d_ff") if name in config["options"]}
    roles = {"teacher", "start"} if config["kind"] == "finetuned" else {"teacher"}
    kind |= {role: kind_of({**config[role], "training": None}) for role in roles & set(config)}
    return kind


def name_of(config: Config) -> str:
    """Of a kind, for people."""
    if config["kind"] == "finetuned":
        return f"{config['task']}: {name_of(config['start'])}{', KD' if 'distillation' in config else ''}"
    kind = {"dense_kd": "dense"}.get(config["kind"], config["kind"])
    experts = config.get("upcycling", config.get("model", {})).get("num_experts") if kind == "moe" else None
    parts = [kind if experts is None else f"{kind} of {experts} experts"]
    if "upcycling" in config:
        parts.append("upcycled")
    if config.get("model", {}).get("slots_per_expert") and kind == "moe":
        parts.append("Soft MoE")
    parts += [f"{name} {value}" for name, value in config.get("options", {}).items() if name in ("k", "d_ff")]
    if "distillation" in config:
        more = {k: v for k, v in config["distillation"].items() if k not in ("temperature", "alpha", "depth_weights")}
        parts.append("KD from " + name_of(config["teacher"]).partition(": ")[2])
        parts += [f"{name} {value}" for name, value in more.items()]
    return f"{config['domain']}: {', '.join(parts)}"


def try_step(config: Config, cache_dir: Path, execution: Execution) -> Trial:
    """Build a training's models, read a batch of each split, count a pass, make a step."""
    data = open_data(config["domain"], frozen(config["data"]), cache_dir)
    task = task_of(config, data)
    _enough_memory(config)
    model, teacher, distillation = build_model(config, data), None, None
    if "distillation" in config:
        distillation, teacher = Distillation(**config["distillation"]), build_model(config["teacher"], data)
    recipe = Training(**config["training"])
    recipe = replace(recipe, steps=1, batch_size=EXAMPLES, evaluations=0)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.capacity_factor = None  # an untrained one sends more than that to some experts, which drop it
    flops = _operations_of_step(model, teacher, task, recipe) / EXAMPLES
    kept = [_kept_bytes(model, task, replace(recipe, batch_size=n)) for n in (EXAMPLES, 2 * EXAMPLES)]
    activations = (kept[1] - kept[0]) / EXAMPLES
    _read_validation(task, config)
    started = time.perf_counter()
    arguments = {"seed": 0, "teacher": teacher, "distillation": distillation}
    model, _ = fit(model, task, recipe, **arguments, device_batch=execution.device_batch)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    taught = 0 if teacher is None else sum(p.numel() for p in teacher.parameters())
    each = 16 + (4 if recipe.ema_decay else 0)  # float32: weight, gradient, two moments; the moving average
    fixed = each * parameters + 4 * taught + max(0.0, kept[0] - EXAMPLES * activations)
    return Trial(parameters, taught, flops, fixed, activations, seconds)


def _enough_memory(config: Config) -> None:
    """A published MoE has to be in memory to be tried: say so before it is read."""
    published = config.get("teacher", config).get("model", {}).get("checkpoint")
    if published:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(published, trust_remote_code=False)
            parameters = sum(p.numel() for p in model_class(settings).from_config(settings).parameters())
        needed, free = 4 * parameters, psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"{published}: expected {needed / 1e9:.0f} GB of free memory, found {free / 1e9:.0f} GB")


def _autocast(recipe: Training) -> torch.autocast:
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision)
    return torch.autocast(default_device().type, precision, enabled=precision is not None)


def _operations_of_step(model: nn.Module, teacher: nn.Module | None, task: Task, recipe: Training) -> float:
    """Multiplications and additions, forward, backward and the teacher's forward."""
    device = default_device()
    (batch,) = task.batches(recipe, 0, 0, device)
    mapping = {torch.ops.aten._grouped_mm: grouped_flops}
    # The fused attention of some devices is not counted.
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        with _autocast(recipe):
            loss = task.loss(task.forward(model.to(device).train(), batch), batch)
        loss.backward()
        if teacher is not None:
            with torch.no_grad(), _autocast(recipe):
                task.forward(teacher.to(device).eval(), batch)
    model.zero_grad()
    return counter.get_total_flops()


def _kept_bytes(model: nn.Module, task: Task, recipe: Training) -> int:
    """What a forward pass keeps for the backward pass."""
    (batch,) = task.batches(recipe, 0, 0, default_device())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _autocast(recipe):
        task.loss(task.forward(model, batch), batch)
    return sum(kept.values())


def _read_validation(task: Task, config: Config) -> None:
    if config["domain"] == "image":
        next(iter(task._loader(task.data.val, evaluation_keys(len(task.data.val), EXAMPLES)[:1])))


def costs(configs: Mapping[str, Config], cache_dir: Path, execution: Execution) -> tuple[pd.DataFrame, list[str]]:
    """One row a kind of training: ``training, trainings, steps, batch_size`` and what :class:`Trial` has; and the kinds that could
    not be tried, with the error."""
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
            rows.append({**row, **asdict(try_step(first, cache_dir, execution))})
        except (OSError, ValueError, RuntimeError, MemoryError, AssertionError) as error:
            failed.append(f"{row['training']}: {type(error).__name__}: {error}")
    columns = ["training", "trainings", "batch_size", "steps", *Trial.__dataclass_fields__]
    return pd.DataFrame(rows, columns=columns), failed


def hours_by_card(table: pd.DataFrame) -> pd.DataFrame:
    """GPU hours of all trainings on each of :data:`CARDS`, at :data:`UTILISATION` of its peak, and how many examples of the
    largest model fit on one at a time."""
    total = _all_operations(table).sum()
    rows = []
    for card, (peak, memory) in CARDS.items():
        room = (USABLE * memory * 1e9 - table["fixed_bytes"]) / table["activation_bytes"]
        hours = _hours(total, peak)
        rows.append({"card": card, "GPU hours": hours, "GPU days": hours / 24, "examples at a time": int(room.min())})
    return pd.DataFrame(rows)


def _all_operations(table: pd.DataFrame) -> pd.Series:
    return table["flops"] * table["batch_size"] * table["steps"]


def _hours(operations, peak: float):
    return operations / (peak * 1e12 * UTILISATION) / 3600


def data_reports(configs: Mapping[str, Config], cache_dir: Path) -> list[str]:
    """A line for each data set, which is opened for it."""
    found = {}
    for config in configs.values():
        found[config["domain"], frozen(config["data"])] = None
    return [open_data(domain, data, cache_dir).report for domain, data in found]


def report(table: pd.DataFrame) -> None:
    """Print the tables, for people."""
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
            "A100 hours": _hours(_all_operations(table), CARDS["A100 80GB"][0]).map("{:,.1f}".format),
            f"step of {EXAMPLES} here, s": table["step_seconds"].map("{:.2f}".format),
        }
    )
    print(shown.to_string(index=False))
    print(
        "\nGFLOPs: forward, backward, and the teacher's forward. Fixed: weights, gradients, optimizer, moving average, teacher."
    )
    total = _all_operations(table).sum()
    cards = hours_by_card(table).round({"GPU hours": 1, "GPU days": 2})
    print(
        f"\nAll {table['trainings'].sum()} trainings: {total:.3g} FLOPs. At {UTILISATION:.0%} of a card's peak, by our guess:\n"
    )
    print(cards.to_string(index=False))
    print(
        "\nExamples at a time: of the largest training, without sharding; --device-batch adds up the gradients of more."
    )


def main(plan_file: str) -> int:
    logging.getLogger("timm").setLevel(logging.ERROR)  # a schedule of one step is meant
    plan = json.loads(Path(plan_file).read_text())
    configs, cache_dir = plan["configs"], Path(plan["cache_dir"])
    gathered = sum(config["training"] is None for config in configs.values())
    print(f"\n{len(configs)} models: {len(configs) - gathered} to train, {gathered} gathered or read\n")
    for line in data_reports(configs, cache_dir):
        print(f"  {line}")
    print(flush=True)
    table, failed = costs(configs, cache_dir, Execution.from_environment())
    if len(table):
        report(table)
    for line in failed:
        print(f"could not be tried: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
