"""Checks a notebook's parameters before anything runs: builds its models without memory for weights, looks into its folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import SimpleNamespace

import torch
from torch import nn

from ones_lib.checkpoints.experts import open_experts
from ones_lib.data.glyphs import CANVAS
from ones_lib.data.images import check_name, folder_classes
from ones_lib.study.image_task import classification_model
from ones_lib.study.inputs import located
from ones_lib.study.parameters import Group, Parameters
from ones_lib.study.records import project_root
from ones_lib.study.study import Study, make_study
from ones_lib.study.text_tasks import pretraining_model

_CHOICES = {"ablation": "ablation_domains", "spectra": "domains"}  # of the domains that a notebook has groups of


def check(parameters: Parameters) -> None:
    """Raise ValueError, OSError or TypeError that names the parameter, for values that are right by themselves but do not go
    together, or do not fit what is on this machine."""
    for name in ("figures_dir", "records_dir"):
        folder = project_root() / getattr(parameters, name)
        if not next(f for f in (folder, *folder.parents) if f.exists()).is_dir():
            raise NotADirectoryError(f"{name}: expected a folder, found a file in its path: {folder}")
    if "spectra" in parameters.groups and parameters.source:
        open_experts(parameters.source)
    for study in studies(parameters):
        if study.domain == "image":
            _check_images(study, parameters)
        elif study.domain == "text":
            _check_text(study, parameters.groups[study.domain])


def studies(parameters: Parameters) -> Iterator[Study]:
    """The studies that a notebook with these parameters makes, one of each domain."""
    groups = parameters.groups
    chosen = [getattr(parameters, name) for group, name in _CHOICES.items() if group in groups]
    for domain in ("image", "text", "language"):
        if domain in groups and all(domain in domains for domains in chosen):
            yield make_study(domain, parameters)


def _check_images(study: Study, parameters: Parameters) -> None:
    name, classes, size = study.data["name"], study.data["num_classes"] or 1000, study.data["image_size"]
    check_name(name)
    if name == "folder":
        classes = len(folder_classes(located(study.data["data_dir"]), study.data["num_classes"]))
    if name == "glyphs" and CANVAS % size:
        raise ValueError(f"image_size: expected a divisor of {CANVAS} for glyphs, found {size}")
    patch = study.model.get("patch_size") or 1
    if size % patch:
        raise ValueError(f"image_size: expected a multiple of patch_size={patch}, found {size}")
    data = SimpleNamespace(num_classes=classes, image_size=size, in_chans=1 if name == "glyphs" else 3)
    groups = parameters.groups
    for config in (study.dense(0), study.moe(0)):
        model = _build(classification_model, config["model"], data, groups["image"])
    layer, depth = model.moe_layers()[0], len(model.hidden_state_readers())
    ranks = [("ranks", rank) for rank in parameters.ranks] if "ablation" in groups else []
    if "student" in groups and parameters.rank is not None:
        ranks.append(("rank", parameters.rank))
    if "teachers" in groups and len(parameters.hidden_depths) != depth:
        raise ValueError(f"hidden_depths: expected {depth} numbers, one a block, found {parameters.hidden_depths}")
    for name, rank in ranks:
        if rank > min(layer.up.shape[1:]):
            raise ValueError(f"{name}: expected a number from 1 to {min(layer.up.shape[1:])}, found {rank}")


def _check_text(study: Study, group: Group) -> None:
    data = SimpleNamespace(vocab_size=study.data["vocab_size"], tokenizer=SimpleNamespace(pad_token_id=0))
    for config in (study.moe(0), study.dense(0)):
        _build(pretraining_model, config["model"], data, group)


def _build(make: Callable[..., nn.Module], model: Mapping, data: SimpleNamespace, group: Group) -> nn.Module:
    """A model without memory for its weights. Errors name the parameters of ``group`` in the place of the model's arguments.
    Libraries' own errors name none, so the values are added."""
    try:
        with torch.device("meta"):
            return make(model, data, 0)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if re.match(r"\w+: expected", str(error)):  # one of ours
            own = {f.metadata["to"].removeprefix("model."): f.name for f in fields(group)}
            message = re.sub(r"\b[a-z]+_[a-z_]+\b", lambda name: own.get(name[0], name[0]), str(error))
            raise ValueError(message) from error
        raise ValueError(f"model: {dict(model)}: cannot be built ({error})") from error
