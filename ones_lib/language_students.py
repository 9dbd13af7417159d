"""The students of causal language models in a study: made by the conversion of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ones_lib.checkpoints import convert
from ones_lib.data.text import TextData
from ones_lib.gathering import gathering_methods
from ones_lib.language_models import LanguageModel, load_language_model, without_bars

#: The control that :func:`gathered_model` knows: what is left of the MoE without its experts.
CONTROL = "zero_ffn"


def gathered_model(teacher: LanguageModel, config: Mapping, data: TextData) -> tuple[LanguageModel, list[dict]]:
    """The student right after gathering, and the rows of :func:`ones_lib.checkpoints.convert`."""
    method, options = config["method"], dict(config["options"])
    if method not in (*gathering_methods(), CONTROL):
        raise ValueError(f"method: expected one of {[*gathering_methods(), CONTROL]}, found {method!r}")
    ids = data.corpus["train"]
    ids = ids[:: max(1, len(ids) // config["calibration_examples"])][: config["calibration_examples"]]
    with TemporaryDirectory() as folder, without_bars():
        source, destination = config["teacher"]["model"].get("checkpoint"), Path(folder, "dense")
        if source is None:
            source = Path(folder, "moe")
            teacher.model.save_pretrained(source)
        table = convert(source, destination, "average" if method == CONTROL else method, calibration=ids, **options)
        model = load_language_model(destination, dtype=torch.float32)
    if method == CONTROL:  # only the read-out is zero, so that it can still learn
        table["output_error"] = 1.0
        generator = torch.Generator().manual_seed(config["seed"])
        for name, tensor in model.named_parameters():
            if ".mlp." in name:
                fresh = torch.randn(tensor.shape, generator=generator) * model.config.initializer_range
                tensor.data.copy_(torch.zeros_like(tensor) if "down_proj" in name else fresh)
    return LanguageModel(model), table.to_dict("records")
