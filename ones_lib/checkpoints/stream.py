"""Runs a causal MoE block by block over a long text. What passes between two blocks is on disk, not in memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ones_lib.checkpoints.quantised import Dequantised, without_quantization
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stored import StoredModel, open_checkpoint
from ones_lib.data.files import opened, save_tensors
from ones_lib.models.causal import (
    block_of,
    empty_model,
    if_float16,
    load_language_model,
    model_config,
    with_odd_experts,
)

TOKENS_A_SLICE = 4096  # tokens that go through a block at a time
LEAST_SLICES = 8
See = Callable[[nn.Module, str, int], AbstractContextManager]


class Slices:
    """Tensors of all tokens of a stream, a safetensors file for each slice of them; in memory one slice at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def read(self, number: int, *names: str) -> dict[str, Tensor]:
        """A slice's tensors of these names; without names, all."""
        with opened(self.path(number)) as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(number), tensors)


class LazyModel:
    """A checkpoint's model, of which only what stands outside of the transformer blocks is in memory all the time.

    A block's weights are read from the files when it is opened, and given up when it is closed.

    Args:
        stored: the checkpoint, with an empty model.
        device: of the weights. None: the GPU, if there is one.
    """

    def __init__(self, stored: StoredModel, device: torch.device | None = None) -> None:
        self.stored, self.model = stored, with_odd_experts(deepcopy(stored.model))
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._float32 = self.model._get_dtype_plan(self.dtype)
        self._names: dict[str, list[str]] = {}  # of the tensors, by block
        for name in self.model.state_dict():
            self._names.setdefault(block_of(name), []).append(name)
        self._fill_buffers()
        self._load("")

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def _fill_buffers(self) -> None:
        """Compute what a model has besides its weights, such as rotary frequencies, by transformers' own initialisation."""
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers[name]) is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
            module._is_hf_initialized = False
        with torch.random.fork_rng():
            self.model.initialize_weights()

    def _load(self, block: str) -> None:
        for name in self._names.get(block, []):
            source = name if name in self.stored else self.model.all_tied_weights_keys.get(name)
            if source in self.stored:
                self._set(name, self.stored.read(source))

    def _set(self, name: str, tensor: Tensor) -> None:
        module, _, last = name.rpartition(".")
        module = self.model.get_submodule(module)
        kept = any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in self._float32)
        tensor = tensor.to(self.device, torch.float32 if kept else getattr(module, last).dtype)
        if last in module._buffers:
            module._buffers[last] = tensor
        else:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)

    def _give_up(self, block: str) -> None:
        for name in self._names[block]:
            module, _, last = name.rpartition(".")
            module = self.model.get_submodule(module)
            if last in module._parameters:
                empty = torch.empty_like(module._parameters[last], device="meta")
                module._parameters[last] = nn.Parameter(empty, requires_grad=False)

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """A block with its weights, while it is open."""
        self._load(name)
        try:
            yield self.model.get_submodule(name)
        finally:
            self._give_up(name)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model, whose blocks open when they are called, and close."""
        hooks = []
        for name in filter(None, self._names):
            block = self.model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(lambda module, inputs, name=name: self._load(name)))
            hooks.append(block.register_forward_hook(lambda module, inputs, y, name=name: self._give_up(name)))
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()

    def all(self) -> PreTrainedModel:
        """The model with all of its weights."""
        for name in self._names:
            self._load(name)
        return self.model


def open_stored(folder: Path) -> StoredModel:
    """A checkpoint's tensors with an empty model, whole by names and shapes. No tensor is read.

    Raises:
        FileNotFoundError, ValueError: files or tensors are missing, or others are there.
    """
    read = model_config(folder)
    config = without_quantization(read)
    config.dtype = config.dtype or Shards(folder, lambda name: True).dtype
    model = empty_model(config)
    stored = StoredModel(open_checkpoint(folder, read, model), model, ())
    stored.check()
    return stored


def load_checkpoint(folder: Path, **options) -> PreTrainedModel:
    """:func:`ones_lib.models.causal.load_language_model`; a quantised model is dequantised as everywhere here, into memory.

    Transformers' own dequantisation refuses DeepSeek-V3's blocks, which don't divide every matrix. Of ``options``, such a model
    takes ``device_map`` and what goes with it; so does one in files that transformers doesn't open.
    """
    stored = open_stored(folder)
    if not isinstance(stored.shards, Dequantised) and stored.shards.plain:
        return load_language_model(folder, **options)
    model = LazyModel(stored, torch.device("cpu")).all()
    if torch.cuda.is_available() and "device_map" in options:
        places = infer_auto_device_map(model, options.get("max_memory"), model._no_split_modules)
        model = dispatch_model(model, places, offload_dir=options.get("offload_folder"))
    return model


class BlockStream:
    """The blocks of a causal model, read from its checkpoint one at a time, each with what it is called with besides the hidden
    states.

    Args:
        stored: the checkpoint, with an empty model. A block gets hidden states of the one before, and nothing else.
        ids: token ids of each slice [rows, L], see :func:`equal_slices`.
    """

    def __init__(self, stored: StoredModel, ids: Sequence[Tensor]) -> None:
        self._lazy, self.ids = LazyModel(stored), ids
        self.model, self.device, self.dtype = self._lazy.model, self._lazy.device, self._lazy.dtype
        self.body = text_model(self.model)
        self.blocks = self.body.layers
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._last: tuple[int, list[tuple]] = (-1, [])  # the last slice that was run, and its calls

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)

    def name(self, index: int) -> str:
        """Of a block, such as ``model.layers.3``."""
        return self._names[id(self.blocks[index])]

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """A block with its weights, which are in memory while it is open."""
        return self._lazy.block(self.name(index))

    @torch.no_grad()
    def _calls(self, number: int) -> list[tuple[Tensor, tuple, dict]]:
        """What the model calls each block with for a slice, if blocks change nothing: hidden states, and the rest."""
        if self._last[0] == number:
            return self._last[1]
        found: list[tuple[Tensor, tuple, dict]] = []

        def pass_on(hidden_states: Tensor, *rest: object, **arguments: object) -> Tensor:
            found.append((hidden_states, rest, arguments))
            return hidden_states

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced(block, pass_on))
            self.body(input_ids=self.ids[number].to(self.device), use_cache=False)
        self._last = number, found
        return found

    def embedded(self, number: int) -> Tensor:
        """What the first block gets for a slice, [rows, L, d]."""
        return self._calls(number)[0][0]

    @torch.no_grad()
    def run(self, index: int, number: int, hidden: Tensor) -> Tensor:
        """A block's output for hidden states of a slice; the block has to be open.

        Raises:
            ValueError: it is not finite.
        """
        _, rest, arguments = self._calls(number)[index]
        output = self.blocks[index](hidden.to(self.device), *rest, **arguments)
        output = output[0] if isinstance(output, tuple) else output
        check_finite(output, f"{self._lazy.stored.path}: {self.name(index)}")
        return output

    @torch.no_grad()
    def logits(self, number: int, hidden: Tensor) -> Tensor:
        """The model's logits for a slice, from the last block's hidden states."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(replaced(block, lambda x: hidden.to(self.device)))
            return self.model(input_ids=self.ids[number].to(self.device), use_cache=False).logits


def run_blocks(stream: BlockStream, folder: Path, count: int, description: str, see: See | None = None) -> Slices:
    """Run the first ``count`` blocks on all slices, one block after the other. An interrupted run goes on at its block.

    Args:
        folder: of the work; its ``block-<i>`` are used here.
        description: of the progress bar; empty: there is none.
        see: called with block, name and slice number, returns the context in which the block runs.

    Returns:
        The ``hidden`` states behind the last of them.
    """
    done = (i for i in range(1, count + 1) if (folder / f"block-{i}").exists())
    first = max(done, default=0)
    bar = {"desc": description, "unit": "block", "initial": first, "total": count, "disable": not description}
    for i in tqdm(range(first, count), **bar):
        before, after = Slices(folder / f"block-{i}"), Slices(folder / f"block-{i + 1}.unfinished")
        with stream.block(i) as block:
            for number in range(len(stream)):
                hidden = before.read(number)["hidden"] if i else stream.embedded(number)
                with see(block, stream.name(i), number) if see else nullcontext():
                    after.write(number, {"hidden": stream.run(i, number, hidden)})
        os.replace(after.folder, folder / f"block-{i + 1}")
        shutil.rmtree(before.folder, ignore_errors=True)
    return Slices(folder / f"block-{count}")


def check_finite(output: Tensor, name: str) -> None:
    """Raise ValueError unless what the module ``name`` gives is finite."""
    if not output.isfinite().all():
        raise ValueError(
            f"{name}: expected finite numbers on the text, in {output.dtype}, found NaN or infinity{if_float16(output.dtype)}"
        )


def text_model(model: PreTrainedModel) -> nn.Module:
    """The stack of blocks of a causal or composite model: what holds ``layers``."""
    body = model
    while not hasattr(body, "layers"):
        inner = [getattr(body, name) for name in ("thinker", "language_model", "model") if hasattr(body, name)]
        if not inner:
            raise ValueError(
                f"{type(model).__name__}: expected a model with a stack of blocks, named layers, found none"
            )
        body = inner[0]
    return body


def equal_slices(ids: Tensor) -> tuple[Tensor, ...]:
    """Token ids [n, L], n at least :data:`LEAST_SLICES`, cut into slices of equal size; a rest that fills none is left out."""
    rows = max(1, min(TOKENS_A_SLICE // ids.shape[1], len(ids) // LEAST_SLICES))
    return ids[: len(ids) // rows * rows].long().split(rows)


@contextmanager
def watched(module: nn.Module) -> Iterator[dict]:
    """While it is open, the dictionary has ``inputs`` and ``outputs`` of the module's last call, [N, d], and the ``rest`` of what
    it returned, a tuple."""
    found: dict = {}

    def see(module: nn.Module, inputs: tuple, arguments: dict, output: Tensor | tuple) -> None:
        x = inputs[0] if inputs else arguments["hidden_states"]
        output, *rest = output if isinstance(output, tuple) else (output,)
        found.update(inputs=x.flatten(0, -2), outputs=output.flatten(0, -2), rest=tuple(rest))

    hook = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def replaced(module: nn.Module, function: Callable[[Tensor], Tensor], rest: tuple = ()) -> AbstractContextManager[None]:
    """While it is open, the module computes ``function`` of its first argument, and returns it with the ``rest``, if any."""

    def forward(x: Tensor, *_: object, **__: object) -> Tensor | tuple:
        return (function(x), *rest) if rest else function(x)

    return _replaced(module, forward)


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
