"""What the notebooks compare: lists of entries, each a config and where it stands in a table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType

from ones_lib.distillation import Distillation
from ones_lib.gathering.scale import ROUTER_SCALES
from ones_lib.study.running import Config, steps_of
from ones_lib.study.study import Study


@dataclass(frozen=True)
class Entry:
    """One row of a table of results. ``axes`` are further columns, such as a budget."""

    model: str
    stage: str
    config: Config
    axes: Mapping = field(default_factory=dict)


def reference(study: Study, model: str, seed: int, **axes) -> Entry:
    """The MoE (``moe``), a dense baseline (``dense``; ``dense_long``, which trains as long as teacher and largest KD budget
    together), or the dense model distilled from scratch (``dense_kd``)."""
    config = {
        "moe": lambda: study.moe(seed),
        "dense": lambda: study.dense(seed),
        "dense_long": lambda: study.dense(seed, study.learning.steps),
        "dense_kd": lambda: study.dense_kd(seed),
    }[model]()
    return Entry(model, "distilled" if model == "dense_kd" else "trained", config, axes)


def student(
    study: Study, method: str, seed: int, budget: int | None = None, axes: Mapping | None = None, **config
) -> Entry:
    """A student after ``budget`` steps of KD; ``config`` as in :meth:`ones_lib.study.study.Study.student`."""
    stage = "gathered" if budget == 0 else "distilled"
    return Entry(method, stage, study.student(method, seed, budget, **config), axes or {})


def _baselines(study: Study) -> list[Entry]:
    return [reference(study, model, seed) for seed in study.seeds for model in ("dense", "dense_long")]


def main(study: Study, methods: Iterable[str]) -> list[Entry]:
    """The main table: teacher, dense baselines, and the students of all ``methods`` before and after KD."""
    result = _baselines(study)
    for seed in study.seeds:
        result += [reference(study, model, seed) for model in ("moe", "dense_kd")]
        result += [student(study, method, seed, budget) for method in methods for budget in (0, None)]
    return result


def by_budget(study: Study, methods: Iterable[str], budgets: Iterable[int]) -> list[Entry]:
    """Students of all ``methods`` after each budget of KD (column ``budget``), and their baselines."""
    result, budgets = _baselines(study), list(budgets)
    for seed in study.seeds:
        result.append(reference(study, "moe", seed))
        result += [student(study, m, seed, budget, {"budget": budget}) for budget in budgets for m in methods]
    return result


def by_width(study: Study, methods: Iterable[str]) -> list[Entry]:
    """Students of all ``methods`` after the largest budget of KD, of one expert's width and of the active width, in hidden
    units (column ``d_ff``); the MoE, and a trained dense model of each width (``dense``, ``dense_active``).

    Empty without methods, and where the widths are one, because a token passes through one expert.
    """
    methods, result = list(methods), []
    one, active = study.widths() if methods else (0, 0)
    if one == active:
        return []
    for seed in study.seeds:
        result += [reference(study, "moe", seed), reference(study, "dense", seed, d_ff=one)]
        result.append(Entry("dense_active", "trained", study.dense(seed, d_ff=active), {"d_ff": active}))
        # Those of one expert's width have no option: they are the main table's.
        widths = [(one, {}), (active, {"d_ff": active})]
        result += [
            student(study, m, seed, None, {"d_ff": d_ff}, **options) for m in methods for d_ff, options in widths
        ]
    return result


def by_experts(
    study: Study, methods: Iterable[str], counts: Iterable[int], budget: int, steps: Iterable[int] = ()
) -> list[Entry]:
    """Teachers with each number of experts (column ``num_experts``) and their students after ``budget`` steps of KD.

    With ``steps``, each teacher for each of these numbers of steps (column ``teacher_steps``): there are MoEs of equal benefit
    and different numbers of experts, and the other way round.
    """
    result, methods = _baselines(study), list(methods)
    lengths = [(length, {"teacher_steps": length}) for length in steps] or [(None, {})]
    cells = [(count, *length) for count in counts for length in lengths]
    for seed in study.seeds:
        for count, length, axis in cells:
            axes, teacher = {"num_experts": count, **axis}, study.moe(seed, length, num_experts=count)
            result.append(Entry("moe", "trained", teacher, axes))
            result += [student(study, method, seed, budget, axes, teacher=teacher) for method in methods]
    return result


def by_variant(study: Study, variants: Iterable[tuple[str, Mapping]], budgets: Iterable[int]) -> list[Entry]:
    """Students by variants of methods (columns ``scale, rank``) and budgets of KD (``budget``; 0: right after gathering).

    ``variants`` are methods with options. The paper's methods have scale 1 where none is given; the others have none.
    """
    variants, budgets, result = list(variants), list(budgets), []
    for seed in study.seeds:
        result += [reference(study, model, seed) for model in ("moe", "dense")]
        for method, options in variants:
            scale = options.get("scale", 1.0 if method in ROUTER_SCALES else None)
            for budget in budgets:
                axes = {"scale": scale, "rank": options.get("rank"), "budget": budget}
                result.append(student(study, method, seed, budget, axes, **options))
    return result


def by_name(
    study: Study,
    students: Mapping[str, Sequence],
    budgets: Mapping[int, float | None],
    widths: Sequence[str] = ("active",),
    dense_widths: Iterable[str] = (),
    rates: Mapping[str, Mapping[str, Mapping[int, float]]] = MappingProxyType({}),
    **axes,
) -> list[Entry]:
    """Causal students that have a name of their own, by width (column ``width``) and budget of KD (column ``budget``; 0: right
    after gathering); the MoE, and dense baselines from scratch.

    Args:
        students: by name a method, its options, and, if these are not ``widths``, its widths; or a mapping from each of these to
            its largest budget.
        budgets: with the learning rate of each; None: the study's.
        widths: each a ``d_ff`` of :func:`ones_lib.checkpoints.convert`, or ``expert``.
        dense_widths: those of more dense baselines (``dense_width``, and ``dense_width_long``, as ``dense_long``).
        rates: by student, width and budget, other learning rates than those of ``budgets``.
    """
    result = []
    for seed in study.seeds:
        result += [reference(study, model, seed, **axes) for model in ("dense", "dense_long", "moe")]
        result += [
            Entry(model, "trained", study.dense(seed, steps, d_ff=width), {**axes, "width": width})
            for width in dense_widths
            for model, steps in (("dense_width", 0), ("dense_width_long", study.learning.steps))
        ]
        for name, (method, options, *own) in students.items():
            chosen = own[0] if own else widths
            largest = chosen if isinstance(chosen, Mapping) else dict.fromkeys(chosen, max(budgets))
            for width, budget in product(largest, budgets):
                if budget > largest[width]:
                    continue
                found = student(
                    study,
                    method,
                    seed,
                    budget,
                    {**axes, "width": width, "budget": budget},
                    learning_rate=rates.get(name, {}).get(width, {}).get(budget, budgets[budget]),
                    **{"d_ff": None if width == "expert" else width, **options},
                )
                result.append(replace(found, model=name))
    return result


def by_teacher(
    study: Study, teachers: Callable[[int], Mapping[str, Config]], methods: Iterable[str], budgets: Iterable[int]
) -> list[Entry]:
    """Other teachers (column ``teacher``), their students by methods and budgets of KD (``budget``), and dense baselines.

    ``teachers(seed)`` gives configs by name. Each teacher's ``dense_long`` trains as long as that teacher, the model it starts
    from, and the largest budget together.
    """
    methods, budgets, result = list(methods), list(budgets), []
    for seed in study.seeds:
        for name, teacher in teachers(seed).items():
            axes = {"teacher": name}
            more = steps_of(teacher) + steps_of(teacher.get("start", {})) - study.teaching.steps + max(budgets)
            result.append(Entry("moe", "trained", teacher, axes))
            result.append(reference(study, "dense", seed, **axes))
            result.append(Entry("dense_long", "trained", study.dense(seed, more), axes))
            for method in methods:
                for budget in budgets:
                    result.append(student(study, method, seed, budget, {**axes, "budget": budget}, teacher=teacher))
    return result


def by_loss(study: Study, losses: Mapping[str, Distillation], methods: Iterable[str], budget: int) -> list[Entry]:
    """Students of methods after ``budget`` steps of KD by each of several losses (column ``loss``)."""
    methods, result = list(methods), []
    for seed in study.seeds:
        result += [reference(study, model, seed) for model in ("moe", "dense")]
        for method in methods:
            for name, loss in losses.items():
                result.append(student(study, method, seed, budget, {"loss": name}, distillation=loss))
    return result


def by_task(study: Study, methods: Iterable[str], budget: int | None = None) -> list[Entry]:
    """The main table's models fine-tuned on the tasks (column ``task``), students after ``budget`` steps of KD.

    A student right after gathering is the fine-tuned MoE gathered, with no training at all.
    """
    result = []
    for seed in study.seeds:
        for task in study.tasks:
            axes, teacher = {"task": task}, study.finetuned(task, study.moe(seed))
            learnt_from = teacher if study.finetune_kd else None
            starts = {model: reference(study, model, seed).config for model in ("dense", "dense_long", "dense_kd")}
            result.append(Entry("moe", "trained", teacher, axes))
            result += [Entry(m, "trained", study.finetuned(task, starts[m]), axes) for m in ("dense", "dense_long")]
            result += [student(study, method, seed, 0, axes, teacher=teacher) for method in methods]
            distilled = {"dense_kd": starts["dense_kd"], **{m: study.student(m, seed, budget) for m in methods}}
            result += [Entry(m, "distilled", study.finetuned(task, s, learnt_from), axes) for m, s in distilled.items()]
    return result


def by_task_and_budget(study: Study, methods: Iterable[str], budgets: Iterable[int]) -> list[Entry]:
    """Students of all ``methods`` after each budget of KD, fine-tuned (columns ``task, budget``), and their baselines.
    A budget of 0 is the student fine-tuned right after gathering."""
    methods = list(methods)
    result = [entry for entry in by_task(study, []) if entry.stage == "trained"]
    for budget in budgets:
        entries = [e for e in by_task(study, methods, budget) if e.model in methods and e.stage == "distilled"]
        result += [replace(entry, axes={**entry.axes, "budget": budget}) for entry in entries]
    return result
