"""Reconstruction: every feed-forward network of a twin regressed onto its MoE layer, over a text of any length.

The MoE runs block by block, once over the whole text. A block's inputs and outputs are on disk in the model's dtype, so memory
holds one block's experts, one network with the optimizer's state (Adam's, two numbers a weight of *one* layer), and a few slices
of tokens. Any interruption is continued with the same result.

Other names for the idea: layer-wise or block-wise reconstruction, as in post-training quantisation (BRECQ, Li et al., arXiv
2102.05426); targets that make up for the errors of earlier layers are GPTAQ's (Li et al., arXiv 2504.02692).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ones_lib.calibration import Activation, LayerActivations, squared_error_on
from ones_lib.checkpoints.architectures import ONE_EXPERT
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.stream import BlockStream, Slices, check_finite, equal_slices, replaced, watched
from ones_lib.data.files import opened, save_tensors
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.regression import readout_on, relative_adam

LEAST_STEPS = 200  # optimizer steps of a layer, at least; more where a pass over the stream takes more
BATCH = 1024  # tokens of a step
BUFFERED = 8  # slices that are in memory, of which a step's tokens are drawn
SOLVED = 16  # tokens for each hidden unit that the read-out is solved on, at most
LEARNING_RATE, RIDGE = 0.2, 1e-6
REPORT_EVERY, SAVE_EVERY = 100, 500  # steps


@dataclass(frozen=True)
class LayerTokens:
    """A layer's tokens on disk: inputs x and targets y of the regression. The last one or two slices are held out.

    Args:
        slices: with ``inputs`` and ``targets`` [N, d].
        count: number of slices.
    """

    slices: Slices
    count: int
    activation: Activation
    device: torch.device

    @property
    def trained(self) -> int:
        """Number of slices that are not held out."""
        return self.count - (2 if self.count >= 32 else 1)

    @cached_property
    def size(self) -> int:
        """Number of tokens of a slice."""
        return len(self.slices.read(0, "inputs")["inputs"])

    def held_out(self) -> Iterator[LayerActivations]:
        return (self._activations(number) for number in range(self.trained, self.count))

    def error(self, ffn: FeedForwardWeights) -> float:
        """Relative error on the held-out tokens, ``sqrt(sum |f(x) - y|^2 / sum |y|^2)``."""
        return squared_error_on(ffn, self.held_out()) ** 0.5

    def solved(self, units: int) -> Iterator[LayerActivations]:
        """Slices to solve a read-out of so many hidden units on, evenly spread."""
        wanted = min(self.trained, -(-SOLVED * units // self.size))
        return (self._activations(number * self.trained // wanted) for number in range(wanted))

    def _activations(self, number: int) -> LayerActivations:
        found = self.slices.read(number, "inputs", "targets")
        x, y = (found[name].to(self.device).float() for name in ("inputs", "targets"))
        return LayerActivations(x, torch.ones_like(x[:, :1]), y, self.activation)

    def batches(self, batch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``x, y`` [batch, d] of every step after ``start``, pass after pass in another order. A step depends on its number
        alone."""
        step, number = 0, 0
        while True:
            generator = torch.Generator().manual_seed(number)
            for some in torch.randperm(self.trained, generator=generator).split(BUFFERED):
                order = torch.randperm(len(some) * self.size, generator=generator)
                drawn = order[: max(1, len(order) // batch) * batch].split(batch)
                if step + len(drawn) > start:
                    found = [self.slices.read(int(i), "inputs", "targets") for i in some]
                    x, y = (torch.cat([part.pop(name) for part in found]) for name in ("inputs", "targets"))
                for rows in drawn:
                    step += 1
                    if step > start:
                        yield tuple(t[rows].to(self.device).float() for t in (x, y))
            number += 1


def regress(
    start: FeedForwardWeights, tokens: LayerTokens, checkpoint: Path, description: str, mixed: bool = False
) -> tuple[FeedForwardWeights, list[dict]]:
    """The network nearest to the targets that is found, and the held-out error on the way: rows ``tokens, error``.

    The read-out of the start is solved in closed form. Then Adam moves all weights, with a learning rate relative to them
    (:func:`ones_lib.gathering.regression.relative_adam`), and the read-out is solved again. Of these, that with the smallest
    held-out error is returned.

    Args:
        checkpoint: file to resume from, written every :data:`SAVE_EVERY` steps.
        description: of the progress bar, which shows the held-out error.
        mixed: compute the steps in bfloat16.
    """
    start = start.map(lambda t: t.to(tokens.device).float())
    batch = min(BATCH, tokens.size)
    steps = max(LEAST_STEPS, tokens.trained * tokens.size // batch)
    state = _State.begin(start, tokens, steps) if not checkpoint.exists() else _State.load(checkpoint, tokens, steps)
    with tqdm(total=steps, initial=state.step, desc=description, unit="step") as bar:
        for x, y in tokens.batches(batch, state.step):
            if state.step % REPORT_EVERY == 0:
                error = tokens.error(state.moving.map(torch.detach))
                state.rows.append({"tokens": state.step * batch, "error": error})
                bar.set_postfix(error=f"{error:.3f}")
            if state.step == steps:
                break
            state.take_step(x, y, tokens.activation, mixed)
            bar.update()
            if state.step % SAVE_EVERY == 0:
                state.save(checkpoint)
    moved, candidates = state.moving.map(torch.detach), [start, state.solved]
    if moved.is_finite():  # else the steps have diverged
        candidates += [moved, readout_on(moved, tokens.solved(start.d_ff), RIDGE)]
    found = [(tokens.error(ffn), ffn) for ffn in candidates]
    error, best = min(found, key=lambda pair: (math.isnan(pair[0]), pair[0]))
    rows = [{"tokens": 0, "error": found[0][0]}, *state.rows, {"tokens": steps * batch, "error": error}]
    return best, rows


class _State:
    """A regression under way: the start with its read-out solved, the weights that move, and Adam."""

    def __init__(self, solved: FeedForwardWeights, steps: int) -> None:
        self.solved, self.step, self.rows = solved, 0, []
        with torch.enable_grad():
            self.moving = solved.map(lambda t: t.clone().requires_grad_())
        self.optimizer, self.schedule = relative_adam(self.moving, steps, LEARNING_RATE)

    @classmethod
    def begin(cls, start: FeedForwardWeights, tokens: LayerTokens, steps: int) -> _State:
        return cls(readout_on(start, tokens.solved(start.d_ff), RIDGE), steps)

    def take_step(self, x: Tensor, y: Tensor, activation: Activation, mixed: bool) -> None:
        """A step of Adam on the mean squared error of tokens ``x, y`` [batch, d]."""
        with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            error = (self.moving.apply(x, activation) - y).float().square().sum(dim=1).mean()
        self.optimizer.zero_grad()
        error.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def save(self, path: Path) -> None:
        tensors = {f"solved.{name}": t for name, t in self.solved.tensors()}
        for name, t in self.moving.tensors():
            tensors[f"moving.{name}"] = t
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[t].items()}
        facts = {"step": self.step, "rows": self.rows, "schedule": self.schedule.state_dict()}
        facts["rates"] = [group["lr"] for group in self.optimizer.param_groups]
        save_tensors(path, tensors, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, tokens: LayerTokens, steps: int) -> _State:
        saved, facts = load_file(path), _facts(path)
        solved = {n.removeprefix("solved."): t.to(tokens.device) for n, t in saved.items() if n.startswith("solved.")}
        state = cls(FeedForwardWeights(**solved), steps)
        state.step, state.rows = facts["step"], facts["rows"]
        state.schedule.load_state_dict(facts["schedule"])
        for group, rate in zip(state.optimizer.param_groups, facts["rates"], strict=True):
            group["lr"] = rate
        for name, t in state.moving.tensors():
            t.data.copy_(saved[f"moving.{name}"])
            keys = [key for key in saved if key.startswith(f"optimizer.{name}.")]
            state.optimizer.state[t] = {key.rsplit(".", 1)[1]: saved[key].to(t.device) for key in keys}
        return state


def _facts(path: Path) -> dict:
    """What was stored beside a file's tensors."""
    with opened(path) as file:
        return json.loads(file.metadata()["facts"])


def check_student_inputs(plan: TwinPlan, ids: Tensor) -> None:
    """Raise ValueError if a layer's network can't be regressed onto the teacher's residual stream. One block runs, on the first of
    ``ids`` [n, L]."""
    sparse = next(block for block in plan.blocks if block.sparse)
    stream = BlockStream(plan.stored, [ids[:1].long()])
    i = next(i for i in range(len(stream.blocks)) if stream.name(i) == sparse.name)
    with stream.block(i):
        _scale(stream, i, _site(plan, stream, sparse))


def takes_student_inputs(plan: TwinPlan, ids: Tensor) -> bool:
    """Whether :func:`check_student_inputs` raises nothing."""
    try:
        check_student_inputs(plan, ids)
    except ValueError:  # or a weight is NaN, say: the conversion looks for that later, and says which one
        return False
    return True


def _site(plan: TwinPlan, stream: BlockStream, block: Block) -> nn.Module:
    """The module whose place a network takes: the MoE layer, or its routed experts if the twin keeps the rest of it."""
    return stream.model.get_submodule(block.experts if plan.architecture.kind == ONE_EXPERT else block.ffn)


def _scale(stream: BlockStream, i: int, site: nn.Module) -> float:
    """What a block multiplies its network's output by before it adds it.

    Raises:
        ValueError: it does something else to it, such as norm it.
    """
    refusal = ValueError(
        f"student_inputs: expected blocks that add their network's output as it is, found {stream.name(i)}, which changes it"
    )
    hidden, outputs = stream.embedded(0), []  # any would do
    with watched(site) as found:
        stream.run(i, 0, hidden)
    if found["outputs"].shape != hidden.flatten(0, -2).shape:
        raise refusal
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(found["outputs"].shape, generator=generator)
    # A norm would be a factor for tokens of one size; and bfloat16 rounds off what is added to larger numbers.
    noise *= 0.5 + torch.rand(len(noise), 1, generator=generator)
    noise = (noise * max(t.float().std().item() for t in (found["outputs"], hidden))).to(found["outputs"])
    for output in (noise, torch.zeros_like(noise)):
        with replaced(site, lambda x, output=output: output.view_as(x), found["rest"]):
            outputs.append(stream.run(i, 0, hidden).flatten(0, -2).float())
    added, noise = outputs[0] - outputs[1], noise.float()
    scale = float((added * noise).sum() / noise.square().sum())
    if (added - scale * noise).norm() > 0.05 * added.norm():
        raise refusal
    return scale


class Reconstruction:
    """The reconstruction of all layers of a twin, one after the other, in a folder that holds what is done.

    Args:
        plan: the twin's.
        folder: of the work. ``fitted`` in it has the networks.
        student_inputs: whether a layer gets what the twin's earlier layers make of the text, and has the teacher's residual stream
            behind the block as its target, so that it makes up for their errors. Else it gets the teacher's own inputs and has the
            MoE layer's output as its target.
    """

    def __init__(self, plan: TwinPlan, folder: Path, student_inputs: bool) -> None:
        self.plan, self.folder, self.student_inputs = plan, folder, student_inputs

    def fitted(self, block: Block) -> tuple[FeedForwardWeights, dict] | None:
        """A layer's network in float32, and its row with the ``course`` of :func:`regress`; None: it is not there yet."""
        path = self._fitted_path(block.name)
        return (FeedForwardWeights(**load_file(path)), _facts(path)) if path.exists() else None

    def _fitted_path(self, name: str) -> Path:
        return self.folder / "fitted" / f"{name}.safetensors"

    def run(self, ids: Tensor, start: Callable[[Block], tuple[FeedForwardWeights, dict]]) -> None:
        """Fit the layers that are not there yet. ``start`` gives the network that a layer starts from, and the layer's row.

        Raises:
            ValueError: something that is computed is not finite.
        """
        sparse = {block.name: block for block in self.plan.blocks if block.sparse}
        if all(self._fitted_path(name).exists() for name in sparse):
            return
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        stream = BlockStream(self.plan.stored, equal_slices(ids[order]))
        last = max(i for i in range(len(stream.blocks)) if stream.name(i) in sparse)
        first = max((i for i in range(last + 1) if self._done(f"block-{i}")), default=0)
        for i in range(first, last + 1):
            block = sparse.get(stream.name(i))
            if block is not None:
                self._fit(stream, i, block, start, f"layer {i + 1} of {len(stream.blocks)}")
            if i < last:
                self._pass_on(stream, i, block)
            for j in range(i + 1):  # the first ones may be left of an interrupted run
                shutil.rmtree(self.folder / f"block-{j}", ignore_errors=True)
                shutil.rmtree(self.folder / f"tokens-{j}", ignore_errors=True)

    def bytes(self, tokens: int) -> int:
        """What is on the disk at a time: hidden states before and behind a block, its layer's tokens, and the networks."""
        plan = self.plan
        hidden = tokens * plan.d_model * plan.stored.model.dtype.itemsize
        networks = 4 * 3 * plan.d_model * plan.width * sum(block.sparse for block in plan.blocks)
        return (7 if self.student_inputs else 5) * hidden + networks

    def _done(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _write_all(self, name: str, count: int, make: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Write ``count`` slices to a folder that has its name only when it is whole."""
        if self._done(name):
            return
        slices = Slices(self.folder / f"{name}.unfinished")
        for number in range(count):
            if not slices.path(number).exists():
                slices.write(number, make(number))
        os.replace(slices.folder, self.folder / name)

    def _hidden(self, stream: BlockStream, i: int, number: int) -> dict[str, Tensor]:
        """What block i gets for a slice: in the ``teacher`` and, where it differs, in the ``student``."""
        return {"teacher": stream.embedded(number)} if i == 0 else Slices(self.folder / f"block-{i}").read(number)

    def _beside(self, stream: BlockStream, block: Block) -> nn.Module | None:
        """Shared experts outside of the MoE layer, whose place the network takes too."""
        return (
            stream.model.get_submodule(block.shared) if block.shared and self.plan.architecture.special.shared else None
        )

    def _fit(
        self,
        stream: BlockStream,
        i: int,
        block: Block,
        start: Callable[[Block], tuple[FeedForwardWeights, dict]],
        description: str,
    ) -> None:
        if self._fitted_path(block.name).exists():
            return
        if not self._done(f"tokens-{i}"):
            with stream.block(i):
                self._write_all(f"tokens-{i}", len(stream), self._tokens_of(stream, i, block))
        tokens = LayerTokens(
            Slices(self.folder / f"tokens-{i}"), len(stream), self.plan.activation(block), stream.device
        )
        checkpoint = self.folder / f"fit-{i}.safetensors"
        mixed = stream.dtype != torch.float32
        first, row = start(block)
        ffn, course = regress(first, tokens, checkpoint, description, mixed)
        self.plan.ffn_tensors(block, ffn.map(lambda t: t.to(self.plan.config.dtype)))  # else it would fail at the end
        path = self._fitted_path(block.name)
        path.parent.mkdir(exist_ok=True)
        errors = {"start_error": course[0]["error"], "reconstruction_error": course[-1]["error"]}
        row = {**row, **errors, "course": course}
        save_tensors(path, dict(ffn.tensors()), {"facts": json.dumps(row)})
        checkpoint.unlink(missing_ok=True)

    def _tokens_of(self, stream: BlockStream, i: int, block: Block) -> Callable[[int], dict[str, Tensor]]:
        """What makes a slice of a layer's tokens."""
        site, beside = _site(self.plan, stream, block), self._beside(stream, block)
        scale = _scale(stream, i, site) if self.student_inputs else 1.0
        # What the MoE layer does to its experts' output, and the twin's doesn't.
        factor = self.plan.factor(block) if self.plan.architecture.kind == ONE_EXPERT else 1.0

        def tokens_of(number: int) -> dict[str, Tensor]:
            hidden = self._hidden(stream, i, number)
            with watched(site) as found, watched(beside) if beside else nullcontext({"outputs": 0}) as shared:
                after = stream.run(i, number, hidden["teacher"])
            if not self.student_inputs:
                targets = factor * (found["outputs"] + shared["outputs"])
                check_finite(targets, f"{self.plan.shards.path}: {block.ffn}")
                return {"inputs": found["inputs"], "targets": targets, "after": after}
            nothing = replaced(beside, torch.zeros_like) if beside else nullcontext()
            with nothing, replaced(site, torch.zeros_like, found["rest"]), watched(site) as found:
                without = stream.run(i, number, hidden.get("student", hidden["teacher"]))
            targets = factor * (after - without).flatten(0, -2) / scale
            check_finite(targets, f"{self.plan.shards.path}: {block.ffn}")
            scales = torch.tensor([scale / factor])
            return {"inputs": found["inputs"], "targets": targets, "after": after, "without": without, "scale": scales}

        return tokens_of

    def _pass_on(self, stream: BlockStream, i: int, block: Block | None) -> None:
        """Write what the next block gets."""
        tokens, ffn = Slices(self.folder / f"tokens-{i}"), None
        if block is not None:
            ffn = self.fitted(block)[0].map(lambda t: t.to(stream.device, stream.dtype))

        def next_of(number: int) -> dict[str, Tensor]:
            if ffn is None:
                return {who: stream.run(i, number, hidden) for who, hidden in self._hidden(stream, i, number).items()}
            if not self.student_inputs:
                return {"teacher": tokens.read(number, "after")["after"]}
            found = tokens.read(number, "inputs", "after", "without", "scale")
            added = ffn.apply(found["inputs"].to(stream.device), self.plan.activation(block)).view_as(found["without"])
            return {"teacher": found["after"], "student": found["without"].to(added) + found["scale"].to(added) * added}

        with stream.block(i) if ffn is None else nullcontext():
            self._write_all(f"block-{i + 1}", len(stream), next_of)
