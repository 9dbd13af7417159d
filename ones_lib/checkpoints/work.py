"""Carries out a conversion in a hidden folder beside its destination, so that it can be interrupted."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils.logging import tqdm

from ones_lib import __version__
from ones_lib.calibration import LayerActivations
from ones_lib.checkpoints.activations import (
    activations_bytes,
    split_tokens,
    store_activations,
    stored_activations,
)
from ones_lib.checkpoints.beside import check_whole, write_beside
from ones_lib.checkpoints.card import model_card
from ones_lib.checkpoints.evaluation import by_block, evaluate, fits_memory, loaded, parts_of
from ones_lib.checkpoints.place import CONVERSION, Place, differences
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.quantised import Dequantised
from ones_lib.checkpoints.reconstruction import Reconstruction
from ones_lib.checkpoints.shards import INDEX, Shards
from ones_lib.checkpoints.text import block_length, ids_hash
from ones_lib.data.files import check_room, remove_unfinished, save_tensors, write_text
from ones_lib.ffn import FeedForwardWeights, concatenate
from ones_lib.gathering.registry import gather_precisely, options_of
from ones_lib.gathering.scale import scaled_output
from ones_lib.models.causal import if_float16, text_config

FILE_SIZE = 50 * 10**9  # bytes of a safetensors file, at most: what transformers' save_pretrained takes
LAYERS = "conversion.csv"
MEASURED = ("perplexity", "kl")  # of a check


class Work:
    """A conversion under way.

    Args:
        place: of the folder to make. ``model`` in the hidden folder becomes it.
        plan: the twin's.
        arguments: all that decides the result, ``source``, ``method``, ``d_ff``, ``options``, ``calibration``, ..., and the text of
            the ``check``.
    """

    def __init__(self, place: Place, plan: TwinPlan, arguments: Mapping) -> None:
        self.place, self.destination, self.plan, self.arguments = place, place.folder, plan, arguments
        self.folder = self.destination.with_name(f".{self.destination.name}.converting")
        self.model, self.rows, self.activations = (self.folder / name for name in ("model", "rows", "activations"))
        self.mark = self.folder / CONVERSION
        self.blocks, self.split = self.folder / "blocks", self.folder / "files.json"
        self.reconstruction = Reconstruction(plan, self.folder / "reconstruction", arguments["student_inputs"])

    def begin(self, ids: Mapping[str, Tensor | None]) -> None:
        """Go on with an interrupted conversion if it is the same, else start one. ``ids`` are those of the texts, [n, L].

        All is tried that does not need the MoE to run: the destination, room on the disk, the model card, and whether
        the MoE's weights are finite.

        Raises:
            OSError: the destination can't be made, or there is not enough room on the disk.
            FileExistsError: there is unfinished work with other arguments, which is not to be replaced.
            ValueError: a weight is not finite.
        """
        arguments = {name: value for name, value in self.arguments.items() if name != "check"}
        identity = json.loads(json.dumps({**arguments, "versions": self._versions()}))
        found = self.unfinished()
        if found != identity:
            if found is not None and self.begun() and not self.place.force:
                odd = "; ".join(list(differences(found, identity))[:5])
                raise FileExistsError(
                    f"{self.folder}: expected unfinished work of the same arguments, found others: {odd}; force=True starts over"
                )
            shutil.rmtree(self.folder, ignore_errors=True)
        self.place.tried()
        remove_unfinished(self.folder)
        for folder in (self.blocks, self.model, self.rows, self.reconstruction.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._check_room(ids)
        self._try_card()
        self.plan.shards.scratch = self.folder
        if found != identity:
            self.plan.check_weights()
        write_text(self.mark, json.dumps(identity))

    def unfinished(self) -> dict | None:
        """All that decides the result of the work in the hidden folder; None: there is none, or what kills left of its start or
        end."""
        if not self.mark.exists() or not self.model.exists():
            return None
        found = json.loads(self.mark.read_text())
        return found if isinstance(found, dict) else {}

    def begun(self) -> bool:
        """Whether anything is done."""
        return any(path.is_file() and path != self.mark for path in self.folder.rglob("*"))

    def _check_room(self, ids: Mapping[str, Tensor | None]) -> None:
        tokens = {name: 0 if blocks is None else blocks.numel() for name, blocks in ids.items()}
        taken = {
            "the twin": self.plan.bytes + min(self.plan.bytes, FILE_SIZE),  # while files are joined
            "calibration_tokens": activations_bytes(self.plan.stored, tokens["calibration"]),
            "reconstruct_tokens": self.reconstruction.bytes(tokens["reconstruct"]) if tokens["reconstruct"] else 0,
        }
        needed = taken["calibration_tokens"] + max(taken["the twin"], taken["reconstruct_tokens"])
        done = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in taken.items())
        check_room(self.folder, needed - done, f"it is for, in GB: {said}")

    def _try_card(self) -> None:
        """Write the model card to a folder that goes away. (What else lies beside the weights: :func:`check_beside`.)"""
        names = ["layer", "experts", "d_ff", "shared", "width", "gate_sum", "gates"]
        errors = ["output_error", "start_error", "reconstruction_error"]
        layers = pd.DataFrame(
            [[block.ffn, 1, 1, 0, 1, 1.0, ""] for block in self.plan.blocks if block.sparse], columns=names
        )
        layers[errors] = 1.0
        found = {"perplexity": {"MoE": 1.0, "dense": 1.0}, "kl": {"dense": 1.0}} if self.arguments["check"] else {}
        with TemporaryDirectory(dir=self.folder) as folder:
            write_text(Path(folder, "README.md"), model_card(self.plan, self.arguments, layers, found))

    def run_moe(self, ids: Tensor | None) -> None:
        """Run the MoE on ``ids`` [n, L], or on random tokens if its gates have to be measured and there is no text."""
        config, architecture = self.plan.source_config, self.plan.architecture
        known = all(gates.total is not None for gates in architecture.gates.values())
        if ids is None and not (known and not architecture.special.mean_gated):
            length = block_length(config)
            shape = (max(1, self.arguments["calibration_tokens"] // length), length)
            size = text_config(config).vocab_size
            ids = torch.randint(size, shape, generator=torch.Generator().manual_seed(0))
        if self.arguments["calibration"] is not None and self.arguments["reconstruct"] is None:
            self._check_enough(ids)
        if ids is not None:
            store_activations(self.plan.stored, ids, self.activations, self.plan.architecture.streams)

    def _check_enough(self, ids: Tensor) -> None:
        """Warn if a method solves for more than the tokens can settle."""
        method, width = self.arguments["method"], self.plan.routed_width
        halves = 2 if self.plan.source_config.is_encoder_decoder else 1  # which read one each
        given = 3 * ids.numel() // halves // 4  # the rest is held out
        if method in ("readout", "fit") and given < 4 * width:
            warnings.warn(
                f"calibration_tokens: expected at least 4 for each of the {width} hidden units that {method!r} solves for,"
                f" found {given:,} in use; the twin may be far off on other text",
                stacklevel=4,
            )

    def reconstruct(self, ids: Tensor) -> None:
        """Regress the gathered networks onto the MoE layers, on ``ids`` [n, L]."""
        if ids.numel() < 4 * self.plan.width:
            warnings.warn(
                f"reconstruct_tokens: expected at least 4 for each of the {self.plan.width} hidden units, found {ids.numel()};"
                " the twin may be far off on other text",
                stacklevel=3,
            )
        self.reconstruction.run(ids, self.gather_layer)

    def write_shards(self) -> None:
        """Write the weights: a file a block, so that memory holds one, and these joined to files of the size that transformers
        writes. A killed process goes on at its block or file."""
        if not self.split.exists():
            self._write_blocks()
            split = split_state_dict_into_shards_factory(
                Shards(self.blocks).sizes(),
                get_storage_size=lambda size: size,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=FILE_SIZE,
            )
            places = Shards(self.blocks).files
            files = {file: {name: places[name] for name in names} for file, names in split.filename_to_tensors.items()}
            write_text(self.split, json.dumps(files))
        files = json.loads(self.split.read_text())  # by file, the tensors in it, and each one's block
        for file, tensors in files.items():
            if not (self.model / file).exists():
                Shards(self.blocks).join(tensors, self.model / file)
            missing = [file for file in files if not (self.model / file).exists()]
            needed = {block for file in missing for block in files[file].values()}
            for block in self.blocks.glob("*.safetensors"):
                if block.name not in needed:
                    block.unlink()

    def _write_blocks(self) -> None:
        """Write a file a block, and the row of its MoE layer. A block is written while the next one is gathered."""
        blocks = self.plan.blocks

        def write(path: Path, tensors: dict[str, Tensor], row: dict | None) -> None:
            write_text(self.rows / f"{path.stem}.json", json.dumps(row))
            save_tensors(path, tensors, {"format": "pt"})

        with ThreadPoolExecutor(1) as writer:
            writing = None
            for i, block in enumerate(tqdm(blocks, desc=self.destination.name, unit="block")):
                path = self.blocks / f"{i:05d}.safetensors"
                if path.exists():
                    continue
                made = self.convert_block(block)
                if writing is not None:
                    writing.result()  # no more than two blocks are in memory
                writing = writer.submit(write, path, *made)
                del made
            if writing is not None:
                writing.result()

    def convert_block(self, block: Block) -> tuple[dict[str, Tensor], dict | None]:
        """The tensors of a block in the twin, and the row of its MoE layer, if it has one."""
        plan, started = self.plan, time.perf_counter()
        tensors = {name: plan.read(source) for name, source in block.copies.items()}
        if block.sparse:
            ffn, row = self.reconstruction.fitted(block) or self.gather_layer(block)
            tensors |= plan.ffn_tensors(block, ffn.map(lambda t: t.to(plan.config.dtype)))
            return plan.in_files(tensors), {**row, "seconds": time.perf_counter() - started}
        if block.ffn:
            tensors |= plan.ffn_tensors(block, plan.ffn_of(block.ffn).widened(plan.width))
        return plan.in_files(tensors), None

    def gather_layer(self, block: Block) -> tuple[FeedForwardWeights, dict]:
        """The network that replaces a block's MoE layer, and the layer's row."""
        plan = self.plan
        seen = stored_activations(self.activations, block.experts, plan.activation(block))
        text = seen is not None and self.arguments["calibration"] is not None
        gate_sum, gates = plan.architecture.gates[block.experts].total, "architecture"
        if gate_sum is None:
            gate_sum, gates = seen.gate_sum(), "calibration" if text else "random tokens"
        experts = plan.experts(block)
        if text and self.arguments["method"] == "expert_selection":
            seen = replace(seen, probabilities=plan.probabilities(block, seen.inputs))
        experts, seen = plan.with_mean_gates(experts, seen)
        total = float(plan.experts_a_token) if plan.architecture.input_gates else gate_sum
        routed, error = self._gather_measured(block, experts, seen if text else None, total)
        ffn = self._with_shared(block, scaled_output(routed, plan.factor(block)), seen)
        row = {"layer": block.ffn, "experts": len(experts), "d_ff": routed.d_ff, "shared": ffn.d_ff - routed.d_ff}
        row |= {"width": plan.width, "gate_sum": gate_sum, "gates": gates, "output_error": error}
        if text:
            row["frequency"] = seen.expert_frequencies().tolist()
            row["mean_gate"] = seen.gates.mean(dim=0).tolist()
        return ffn.widened(plan.width), row

    def _gather_measured(
        self, block: Block, experts: list[FeedForwardWeights], seen: LayerActivations | None, gate_sum: float
    ) -> tuple[FeedForwardWeights, float]:
        """The routed experts gathered, and the relative error on tokens that the method did not see; with data on the GPU, if there
        is one with room for a layer."""
        if seen is None:
            return self._gather(block.ffn, experts, None, gate_sum), float("nan")

        def on(device: str) -> tuple[FeedForwardWeights, float]:
            given, held_out = split_tokens(seen.map(lambda t: t.to(device)))
            moved = [expert.map(lambda t: t.to(device)) for expert in experts]
            routed = self._gather(block.ffn, moved, given, gate_sum)
            return routed.map(torch.Tensor.cpu), held_out.squared_error(routed) ** 0.5

        if torch.cuda.is_available():
            with suppress(torch.OutOfMemoryError):
                return on("cuda")
        return on("cpu")

    def _gather(
        self, layer: str, experts: list[FeedForwardWeights], given: LayerActivations | None, gate_sum: float
    ) -> FeedForwardWeights:
        """The routed experts gathered, with the scale of the MoE layer."""
        method, options = self.arguments["method"], self.arguments["options"]
        if "calibration" not in options_of(method) and options.get("scale") not in ("scalar", "vector"):
            given = None
        try:
            ffn = gather_precisely(experts, method, given, self.plan.d_ff, **options)
        except ValueError as error:
            raise ValueError(f"{self.plan.shards.path}: {layer}: {error}") from error
        if given is not None:
            return ffn
        return scaled_output(ffn, gate_sum)

    def _with_shared(
        self, block: Block, routed: FeedForwardWeights, seen: LayerActivations | None
    ) -> FeedForwardWeights:
        """A gathered network joined to the shared experts of its block, if there are any."""
        if not block.shared:
            return routed
        shared = self.plan.ffn_of(block.shared).map(lambda t: t.float())
        if self.plan.architecture.special.mean_gated:
            gate = self.plan.read(f"{block.shared}_gate.weight")
            logits = F.linear(seen.inputs.to(gate.dtype), gate).float()
            shared = scaled_output(shared, logits.sigmoid().mean().item())
        return concatenate([routed, shared])

    def write_config(self) -> None:
        """Write the config and, of several files, the index, and copy what lies beside the source's that a twin needs."""
        found = Shards(self.model)
        if len(found.paths()) > 1:
            about = {"metadata": {"total_size": sum(found.sizes().values())}, "weight_map": found.files}
            write_text(self.model / INDEX, json.dumps(about, indent=1))
        write_beside(self.plan.shards.path, self.plan.config, self.model)

    def evaluate(self, ids: Tensor) -> dict[str, dict[str, float]]:
        """Of the MoE and of the twin on blocks [n, L]: see :func:`ones_lib.checkpoints.evaluation.evaluate`."""
        parts, source = parts_of(ids), self.plan.shards
        if isinstance(source, Dequantised) or not fits_memory(source):
            moe = by_block(self.plan, parts, self.folder / f"check-{ids_hash(ids)[:16]}")
        else:
            moe = loaded(source.path, parts, self.folder / "offload-moe")
        with moe as of_moe, loaded(self.model, parts, self.folder / "offload") as of_dense:
            found = evaluate(parts, of_moe, {"dense": of_dense})
        if odd := {name: value for name, value in found["perplexity"].items() if not isfinite(value)}:
            dtype = self.plan.config.dtype
            raise ValueError(f"check: expected finite perplexities in {dtype}, found {odd}{if_float16(dtype)}")
        return found

    def facts(self) -> dict:
        """How the twin is made: the arguments, and what a teacher must have in common with it."""
        config = self.plan.source_config
        same = ("vocab_size", "hidden_size", "num_hidden_layers")
        text = text_config(config)
        return {**self.arguments, "model_type": config.model_type, **{name: getattr(text, name) for name in same}}

    @staticmethod
    def _versions() -> dict[str, str]:
        return {"ones-lib": __version__, "transformers": version("transformers")}

    def finish(self, evaluation: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
        """Write tables and model card, and move all to the destination. Returns the table of layers.

        ``evaluation`` is what :meth:`evaluate` found, or empty.
        """
        rows = [json.loads(path.read_text()) for path in sorted(self.rows.iterdir())]
        layers = pd.DataFrame([row for row in rows if row is not None])
        if "frequency" in layers:
            usage = layers[["layer", "frequency", "mean_gate"]].explode(["frequency", "mean_gate"])
            usage.insert(1, "expert", usage.groupby("layer").cumcount())
            usage.to_csv(self.model / "router_statistics.csv", index=False)
            layers = layers.drop(columns=["frequency", "mean_gate"])
        if "course" in layers:
            course = layers[["layer", "course"]].explode("course", ignore_index=True)
            course = pd.concat([course["layer"], pd.DataFrame(list(course["course"]))], axis=1)
            course.to_csv(self.model / "reconstruction.csv", index=False)
            layers = layers.drop(columns=["course", "output_error"])  # that is of other tokens, without shared experts
        layers.to_csv(self.model / LAYERS, index=False)
        measured = {name: dict(evaluation.get(name, {})) for name in MEASURED}
        layers.attrs.update(measured)
        write_text(self.model / "README.md", model_card(self.plan, self.arguments, layers, evaluation))
        check_whole(self.model)
        self.place.put(self.model, self.facts() | measured | {"versions": self._versions()})
        shutil.rmtree(self.folder)
        return layers


def read_layers(folder: Path) -> pd.DataFrame:
    """The table of layers of a finished conversion."""
    layers = pd.read_csv(folder / LAYERS)
    facts = json.loads((folder / CONVERSION).read_text())
    layers.attrs.update({name: facts.get(name, {}) for name in MEASURED})
    return layers
