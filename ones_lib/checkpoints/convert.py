"""Published MoE checkpoints made dense: a folder or hub name of an MoE in, a folder that plain transformers loads out.

XX DESTINATION --method svd`` or :func:`convert`. The experts of one layer are gathered at
a time, as they lie in the source's safetensors files; everything else is copied. Which architectures there are and what
becomes of them is the table in :mod:`ones_lib.checkpoints.architectures`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir

import pandas as pd
import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils.logging import tqdm

from ones_lib.calibration import LayerActivations, squared_error
from ones_lib.checkpoints.architectures import ARCHITECTURES, Config, architecture_of
from ones_lib.checkpoints.plan import TwinPlan, block_of
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.text import block_length, text_blocks
from ones_lib.data.files import file_stamps, remove_unfinished, save_tensors, write_text
from ones_lib.ffn import FeedForwardWeights, concatenate
from ones_lib.gathering.registry import check_options, gather_precisely, needs_calibration, options_of
from ones_lib.gathering.scale import ROUTER_SCALES, scaled_output
from ones_lib.models.causal import (
    activation_of,
    load_language_model,
    model_inputs,
    perplexity,
    watched_experts,
    without_bars,
)

TOKENS_A_PASS = 4096  # of a calibration: so many go through the MoE at a time
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # tokenizer and generation files; never code


def convert(
    source: str | Path,
    destination: str | Path,
    method: str = "svd",
    d_ff: int | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    calibration_tokens: int = 4096,
    approximate: bool = False,
    check: str | Path | Tensor | None = None,
    progress: bool = True,
    **options,
) -> pd.DataFrame:
    """Make an MoE checkpoint dense: gather the experts of every layer, copy the rest, and write what transformers loads.

    A layer's gathered network is multiplied by what the gates sum to, which is known (1, or a scaling factor) or measured.
    Shared experts without a gate are joined to it exactly. Where the twin's layers are of one width, narrower ones are filled
    up with neurons of no effect. Methods that have a scale get ``scale="router"`` (see :mod:`ones_lib.gathering.registry`), not the
    paper's raw form, under which E experts add up to E times the size.

    An interrupted conversion goes on where it stopped when it is called with the same arguments; until it is whole, all lies
    in a hidden folder beside ``destination``.

    Args:
        source: a folder, or a name on the Hugging Face hub, of an MoE in safetensors files.
        destination: a folder that is not there, or empty.
        method: one of :func:`ones_lib.gathering_methods`.
        d_ff: hidden neurons that the routed experts are gathered to, see :func:`ones_lib.gather`; None: one expert's.
        calibration: a text (see :func:`ones_lib.checkpoints.text.text_blocks`) or token ids [n, L], on which the MoE is run
            once: for methods that look at data, router statistics and output errors. None: none of these; gates whose sum is
            not known are then measured on random tokens.
        calibration_tokens: how many tokens of it.
        approximate: for an MoE with an exact twin that is not a plain dense class (Qwen2-MoE), a plain one that is not exact.
        check: a text or token ids to measure the perplexity of MoE and twin on.
        progress: show bars.
        options: the method's.

    Returns:
        One row an MoE layer: ``layer, experts, d_ff, shared, width, gate_sum, gates, output_error, seconds``. ``width`` is
        that of the twin's layer; ``gates`` says where ``gate_sum`` is from; ``output_error`` is the relative error of the
        routed part on tokens that the method was not given. The same is in the destination's ``conversion.csv``.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, TypeError, ConnectionError, OSError: what was found and what was
            expected, before long work starts; NaN when the tensor is read. Nothing is left behind.
    """
    check_options(method, options)
    for name, value in options.items():
        if not isinstance(value, (str, int, float, list, tuple, type(None))):
            raise TypeError(f"{name}: expected a number, text or list, found {type(value).__name__}")
    if method in ROUTER_SCALES:
        options.setdefault("scale", "router")
    destination = Path(destination).expanduser().resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"destination: expected a folder that is not there or empty, found {destination}")
    if calibration is None and needs_calibration(method, options.get("scale", 1.0)):
        raise ValueError(f"calibration: expected a text, which method {method!r} needs, found None")

    folder = _local_folder(source)
    config = _read_config(folder)
    architecture = architecture_of(config, folder, approximate)
    if architecture.weights_alone and not (
        method == "frequency_average" or (method in ROUTER_SCALES and options["scale"] not in ("scalar", "vector"))
    ):
        allowed = [*ROUTER_SCALES, "frequency_average"]
        raise ValueError(
            f"method: expected one of {allowed}, at a scale that is a number or 'router', for {config.model_type}, whose"
            f" experts compute something else than down(act(gate) * up), found {method!r}"
        )
    shards = Shards(folder)
    plan = TwinPlan(shards, config, architecture, method, d_ff, options.get("k"))
    if isinstance(calibration, (str, Path)):
        calibration = text_blocks(calibration, folder, calibration_tokens, "train")
    if isinstance(check, (str, Path)):
        check = text_blocks(check, folder)
    local = Path(source).expanduser().is_dir()
    origin = {"source": folder.name} if local else {"source": str(source), "revision": folder.name}
    text = None if calibration is None else f"token ids, sha256 {_digest(calibration)}"
    data = {"calibration": text, "calibration_tokens": calibration_tokens}
    chosen = {"method": method, "d_ff": d_ff, "options": options, **data, "approximate": approximate}
    work = _Work(destination, plan, origin | chosen)
    with _only_one(destination), nullcontext() if progress else without_bars():
        work.begin()
        return _convert(plan, config, work, calibration, calibration_tokens, check)


@contextmanager
def _only_one(destination: Path) -> Iterator[None]:
    """Two conversions to one place would start each other's work over."""
    name = hashlib.sha256(str(destination).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(gettempdir()) / f"ones-convert-{name}.lock", timeout=0):
            yield
    except Timeout as error:
        raise FileExistsError(f"destination: another conversion to {destination} is under way") from error


def _convert(
    plan: TwinPlan, config: Config, work: _Work, calibration: Tensor | None, tokens: int, check: Tensor | None
) -> pd.DataFrame:
    architecture, folder = plan.architecture, plan.shards.folder
    try:
        if calibration is not None or architecture.gates(config) is None or architecture.mean_gated:
            _calibrate(plan, config, calibration, tokens, work)
        _write_shards(plan, config, work)
        _write_config(plan, work)
        perplexities = {} if check is None else _perplexities(folder, work, check)
        table = _write_account(plan, config, work, perplexities)
        work.finish()
    except (TypeError, ValueError):  # what was read is bad; interrupted or out of room, it can go on where it stopped
        shutil.rmtree(work.folder)
        raise
    return table


def _local_folder(source: str | Path) -> Path:
    """The checkpoint's folder; of a hub name what transformers' cache holds of it, downloaded where it is missing."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise FileNotFoundError(f"source: expected a folder or a hub name like owner/name, found {str(source)!r}")
    try:
        return Path(
            snapshot_download(str(source), allow_patterns=["model*.safetensors", *(f"*{end}" for end in _COPIED)])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"source: no folder {str(source)!r}, and it could not be had from the Hugging Face hub: {error}"
        ) from error


def _read_config(folder: Path) -> Config:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: expected config.json, found {sorted(p.name for p in folder.iterdir())[:8]}")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: expected JSON ({error})") from error
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{folder}: expected an MoE of type {', '.join(ARCHITECTURES)}, found {kind!r}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.dtype is None:
        config.dtype = torch.float32
    return config


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()


class _Work:
    """The hidden folder in which a conversion is prepared: ``model`` becomes the destination."""

    def __init__(self, destination: Path, plan: TwinPlan, arguments: dict) -> None:
        self.destination, self.plan, self.arguments = destination, plan, arguments
        self.method, self.options = arguments["method"], arguments["options"]
        self.folder = destination.with_name(f".{destination.name}.converting")
        self.model, self.rows = self.folder / "model", self.folder / "rows"
        self.activations = self.folder / "activations"
        source = plan.shards.folder
        stamps = file_stamps([source / "config.json", *plan.shards.paths()])
        versions = [version("ones-lib"), version("transformers")]
        self.identity = json.dumps([str(source.resolve()), arguments, stamps, versions])

    def begin(self) -> None:
        """Go on with the same conversion, or start over, if there is room."""
        mark = self.folder / "conversion.json"
        if self.folder.exists() and (not mark.exists() or mark.read_text() != self.identity):
            warnings.warn(f"{self.folder}: unfinished work of another conversion, starting over", stacklevel=3)
            shutil.rmtree(self.folder)
        remove_unfinished(self.folder)
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        done = sum(f.stat().st_size for f in self.folder.rglob("*.safetensors")) if self.folder.exists() else 0
        needed, free = self.plan.bytes - done, shutil.disk_usage(self.destination.parent).free
        if needed > free:
            raise OSError(
                f"{self.destination.parent}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB"
            )
        for folder in (self.model, self.rows, self.activations):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, self.identity)

    def activations_of(self, block: str, part: str = "*") -> Path:
        """Where the activations of a part of the calibration are, or the pattern of all parts."""
        return self.activations / f"{block}-{part}.safetensors"

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What :func:`convert` returns, and router statistics ``layer, expert, frequency, mean_gate``, empty without a text."""
        rows = [row for path in sorted(self.rows.iterdir()) for row in json.loads(path.read_text())]
        experts = [
            {"layer": row["layer"], "expert": e, "frequency": frequency, "mean_gate": gate}
            for row in rows
            for e, (frequency, gate) in enumerate(
                zip(*(row.pop(k, []) for k in ("frequencies", "mean_gates")), strict=True)
            )
        ]
        return pd.DataFrame(rows), pd.DataFrame(experts)

    def finish(self) -> None:
        if self.destination.exists():
            self.destination.rmdir()
        os.replace(self.model, self.destination)
        shutil.rmtree(self.folder)


def _calibrate(plan: TwinPlan, config: Config, ids: Tensor | None, tokens: int, work: _Work) -> None:
    """Run the MoE once and keep, layer by layer, what its experts got and gave; without a text, what the gates sum to."""
    done = work.activations / "done"
    if done.exists():
        return
    given = ids is not None
    if not given:
        length = block_length(config)
        count = max(1, tokens // length)
        ids = torch.randint(config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    model = load_language_model(plan.shards.folder, device_map="auto", offload_folder=work.folder / "offload")
    means, seen = defaultdict(list), Counter()

    def see(block: str, found: LayerActivations) -> None:
        tensors = {"gates": found.gates.float()}
        if given:
            tensors |= {"inputs": found.inputs, "outputs": found.outputs}
        save_tensors(work.activations_of(block, f"{seen[block]:05d}"), tensors)
        seen[block] += 1

    def see_gate(block: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
            means[block].append(output.float().sigmoid().mean())

        return hook

    for name, module in model.named_modules():
        if plan.architecture.mean_gated and name.endswith(f".{plan.architecture.mean_gated}_gate"):
            module.register_forward_hook(see_gate(block_of(name)))
    # Without the output layer, whose logits of all tokens at once might not fit.
    run = model if config.is_encoder_decoder else model.base_model
    passes = ids.split(max(1, TOKENS_A_PASS // ids.shape[1]))
    with torch.inference_mode(), watched_experts(model, see):
        for batch in tqdm(passes, desc="calibration", unit="batch"):
            run(**model_inputs(config, batch.to(model.device)), use_cache=False)
    save_tensors(work.activations / "mean_gates.safetensors", {k: torch.stack(v).mean() for k, v in means.items()})
    shutil.rmtree(work.folder / "offload", ignore_errors=True)
    done.touch()


def _activations(
    plan: TwinPlan, config: Config, work: _Work, block: str
) -> tuple[Tensor | None, LayerActivations | None]:
    """The gates [N, E] of a block's MoE layer, and all that passed through it, as far as they are known."""
    pattern = work.activations_of(block)
    parts = [load_file(path) for path in sorted(pattern.parent.glob(pattern.name))]
    if not parts:
        return None, None
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "inputs" not in found:
        return found["gates"], None
    tensors = (found[name].float() for name in ("inputs", "gates", "outputs"))
    return found["gates"], LayerActivations(*tensors, activation_of(config))


def _write_shards(plan: TwinPlan, config: Config, work: _Work) -> None:
    """One shard a block, each with the rows of its MoE layers; it is written while the next one is gathered."""
    blocks = plan.blocks()
    total = sum(file.stat().st_size for file in plan.shards.paths())

    def write(path: Path, rows: list[dict], tensors: dict[str, Tensor]) -> None:
        write_text(work.rows / f"{path.stem}.json", json.dumps(rows))
        save_tensors(path, tensors, {"format": "pt"})

    bar = tqdm(total=total, desc=f"{work.method}: {work.destination.name}", unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(1) as writer:
        writing = None
        for i, block in enumerate(blocks, start=1):
            path = work.model / f"model-{i:05d}-of-{len(blocks):05d}.safetensors"
            if not path.exists():
                made = _convert_block(plan, config, work, block)
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, path, *made)
                del made
            bar.update(total * i // len(blocks) - total * (i - 1) // len(blocks))
        if writing is not None:
            writing.result()


def _convert_block(plan: TwinPlan, config: Config, work: _Work, block: str) -> tuple[list[dict], dict[str, Tensor]]:
    tensors = {name: plan.read(name) for name in plan.copies.get(block, [])}
    for module, parts in plan.dense.items():
        if block_of(module) == block:
            tensors |= plan.dense_tensors(module, plan.ffn(parts).widened(plan.width))
    rows = []
    for module in plan.modules:
        if block_of(module) == block:
            started = time.perf_counter()
            ffn, row = _gather_layer(plan, config, work, module)
            tensors |= plan.moe_tensors(module, ffn)
            rows.append({**row, "seconds": time.perf_counter() - started})
    return rows, tensors


def _gather_layer(plan: TwinPlan, config: Config, work: _Work, module: str) -> tuple[FeedForwardWeights, dict]:
    """The twin's network in the place of an MoE layer, and what there is to say of it."""
    block, architecture = module.rsplit(".", 1)[0], plan.architecture
    gates, activations = _activations(plan, config, work, block)
    gate_sum, source = architecture.gates(config), "architecture"
    if gate_sum is None:
        gate_sum = gates.sum(dim=1).mean().item()
        source = "random tokens" if activations is None else "calibration"
    given = held_out = None
    if activations is not None:
        count = len(activations.inputs)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        given, held_out = (
            activations.map(lambda t, part=part: t[part]) for part in order.split(max(1, 3 * count // 4))[:2]
        )

    experts = plan.experts(module)
    dtype = experts[0].up.dtype
    scale = work.options.get("scale")
    on_data = "calibration" in options_of(work.method) or scale in ("scalar", "vector")
    given = given if on_data else None
    if work.method in ("readout", "fit") and len(given.inputs) < 4 * plan.routed_width:
        warnings.warn(
            f"calibration_tokens: expected at least 4 for each of the {plan.routed_width} hidden neurons that"
            f" {work.method!r} solves for, found {len(given.inputs)} in use; the twin may be far off on other text",
            stacklevel=2,
        )
    try:
        ffn = gather_precisely(experts, work.method, given, work.arguments["d_ff"], **work.options)
    except ValueError as error:
        raise ValueError(f"{plan.shards.folder}: {module}: {error}") from error
    if given is None:
        ffn = scaled_output(ffn, gate_sum)
    error = float("nan")
    if held_out is not None and not architecture.weights_alone:
        error = squared_error(ffn, held_out) ** 0.5
    d_ff = ffn.d_ff
    if parts := plan.shared.get(module):
        shared = plan.ffn(parts).map(lambda t: t.float())
        if architecture.mean_gated:
            mean_gates = load_file(work.activations / "mean_gates.safetensors")
            shared = scaled_output(shared, mean_gates[block].item())
        ffn = concatenate([ffn, shared])
    row = {
        "layer": module,
        "experts": len(experts),
        "d_ff": d_ff,
        "shared": ffn.d_ff - d_ff,
        "width": plan.width,
        "gate_sum": gate_sum,
        "gates": source,
        "output_error": error,
    }
    if activations is not None:
        row["frequencies"] = activations.expert_frequencies().tolist()
        row["mean_gates"] = activations.gates.mean(dim=0).tolist()
    return ffn.widened(plan.width).map(lambda t: t.to(dtype)), row


def _write_config(plan: TwinPlan, work: _Work) -> None:
    """What a folder needs beside its shards: index, configuration, and the source's tokenizer and generation files."""
    index = {}
    for path in sorted(work.model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            index |= dict.fromkeys(file.keys(), path.name)
    size = sum((work.model / name).stat().st_size for name in set(index.values()))
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
    write_text(work.model / "model.safetensors.index.json", text)
    plan.config.save_pretrained(work.model)
    for path in plan.shards.folder.iterdir():
        theirs = path.name in ("config.json", "model.safetensors.index.json") or not path.name.endswith(_COPIED)
        if path.is_file() and not theirs:
            shutil.copyfile(path, work.model / path.name)


def _perplexities(source: Path, work: _Work, ids: Tensor) -> dict[str, float]:
    found = {}
    for name, folder in {"MoE": source, "dense": work.model}.items():
        model = load_language_model(folder, device_map="auto", offload_folder=work.folder / "offload")
        found[name] = perplexity(model, ids)
        del model
        shutil.rmtree(work.folder / "offload", ignore_errors=True)
    return found


def _write_account(plan: TwinPlan, config: Config, work: _Work, perplexities: Mapping[str, float]) -> pd.DataFrame:
    """The tables and the model card."""
    layers, experts = work.tables()
    layers.to_csv(work.model / "conversion.csv", index=False)
    if len(experts):
        experts.to_csv(work.model / "router_statistics.csv", index=False)
    write_text(work.model / "README.md", _model_card(plan, config, work, layers, perplexities))
    return layers


def _model_card(
    plan: TwinPlan, config: Config, work: _Work, layers: pd.DataFrame, perplexities: Mapping[str, float]
) -> str:
    arguments, architecture, name = work.arguments, plan.architecture, work.arguments["source"]
    options = ({} if arguments["d_ff"] is None else {"d_ff": arguments["d_ff"]}) | arguments["options"]
    given = "".join(f", {k} = {v}" for k, v in options.items())
    sums, sources = layers["gate_sum"], ", ".join(layers["gates"].unique())
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {name}",
        "tags: [ones, knowledge-gathering, dense]",
        "---",
        f"# {name}, made dense",
        "",
        f"A {plan.config.architectures[0]} whose feed-forward networks were gathered from the {plan.num_experts} experts of"
        f" each MoE layer of {name} ({config.model_type}) by `{arguments['method']}`{given}; all else is a copy. After "
        '"One Student Knows All Experts Know: From Sparse to Dense" (Xue et al., arXiv 2201.10890), whose second step,'
        " distillation from the MoE, is still to be done: as it is, this model is a start for that.",
        "",
        f"- Hidden neurons: {int(layers['d_ff'].max())} gathered"
        + (f" and {int(layers['shared'].max())} of shared experts, joined to them" if layers["shared"].max() else "")
        + (f", in layers {plan.width} wide" if plan.width > (layers["d_ff"] + layers["shared"]).max() else "")
        + f"; an expert has {plan.expert_width}.",
        f"- The gathered networks' outputs are multiplied by what a token's gates sum to: {sums.min():.4g} to"
        f" {sums.max():.4g} (from: {sources}).",
    ]
    unused = plan.width - (layers["d_ff"] + layers["shared"]).min()
    if unused:
        lines.append(
            f"- {unused} neurons of each gathered layer have output weights of zero, because the class has one width for all"
            " layers; a conversion with a d_ff larger by that many would use them."
        )
    if architecture.one_expert:
        lines.append(
            f"- Transformers has no dense class with the attention and norms of {config.model_type}. This is the same class"
            " with one expert, whose gate is 1: dense in function."
        )
    if architecture.mean_gated:
        lines.append(
            "- Approximate: the shared expert's gate, which depends on the token, was replaced by its mean"
            f" over {'random tokens' if arguments['calibration'] is None else 'the calibration'}."
        )
    if layers["output_error"].notna().any():
        errors = layers["output_error"]
        lines.append(
            f"- Relative error of the routed experts' output on held-out tokens, by layer: {errors.min():.3f} to"
            f" {errors.max():.3f}, see conversion.csv; how much each expert is used: router_statistics.csv."
        )
    if perplexities:
        lines.append(f"- Perplexity: MoE {perplexities['MoE']:.4g}, this model {perplexities['dense']:.4g}.")
    made_by = f"ones_lib {version('ones-lib')}, transformers {version('transformers')}"
    lines += ["", f"Made with {made_by}; arguments: `{json.dumps(arguments)}`.", ""]
    return "\n".join(lines)
