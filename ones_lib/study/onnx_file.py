"""A dense model in ONNX: one graph for batches of any size, checked in ONNX Runtime on the record's validation data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ones_lib.data.images import ImageData
from ones_lib.study.language_task import LanguageModel
from ones_lib.study.records import Record
from ones_lib.study.training import Task

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX_FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**24  # bytes of weights in one file: protobuf takes less than 2 GiB
ODD = 1000  # of so many predictions one may be another: ties, which rounding decides


def check_packages() -> None:
    """Raise ImportError unless there is what writes and runs ONNX."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(
            f"onnx: expected the packages {', '.join(PACKAGES)}, found no {missing[0]}: pip install {' '.join(PACKAGES)}"
        )


def onnx_program(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> torch.onnx.ONNXProgram:
    """A model as an ONNX graph for batches, and of token ids for lengths, of any size.

    Args:
        model: returns a tensor, or a tuple with one for each of ``outputs``.
        inputs: examples by name, in the order of the model's arguments: [B, L] of integers or [B, ...], B and L at least 2.
        outputs: names.
    """
    axes = ({0: "batch"} if x.is_floating_point() else {0: "batch", 1: "length"} for x in inputs.values())
    shapes = tuple({axis: torch.export.Dim(name) for axis, name in of_one.items()} for of_one in axes)
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    # On a CPU, the outputs of other attention kernels have strides that do not fit what they are decomposed to.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # about names of axes
        graph = _Positional(model)
        return torch.onnx.export(
            graph, tuple(inputs.values()), dynamo=True, dynamic_shapes=(shapes,), verbose=False, **names
        )


class _Positional(nn.Module):
    """A model called by ``*inputs``, so that shapes can be given without the names of its arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.model(*inputs)


def onnx_session(file: Path) -> InferenceSession:
    """A file in ONNX Runtime, on the CPU with torch's number of threads."""
    import onnxruntime  # an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def write_onnx(model: nn.Module, task: Task, record: Record, folder: Path) -> str:
    """Write :data:`ONNX_FILE` of a record's trained dense model to a folder, and check it; a sentence on what was found.

    Inputs are ``images`` [B, C, H, W] of an image model; ``input_ids``, ``attention_mask``, ``token_type_ids`` [B, L] of an
    encoder; ``input_ids`` [B, L] of a causal model. Outputs are called as in transformers: ``logits``, or ``start_logits`` and
    ``end_logits``.

    Raises:
        ValueError: in ONNX Runtime, more than one of :data:`ODD` predictions of the validation data is another than the record's.
    """
    if record.config["domain"] == "image":
        data = task.data
        graph, inputs = model, {"images": torch.zeros(2, data.in_chans, data.image_size, data.image_size)}
    else:
        graph = _Text(model)
        inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in graph.inputs}
    program = onnx_program(graph, inputs, graph.outputs if isinstance(graph, _Text) else ["logits"])
    program.model.metadata_props.update(_metadata(model, task, record))
    program.save(folder / ONNX_FILE, external_data=sum(p.nbytes for p in model.parameters()) > LARGEST)
    found = task.predict(_OnnxModel(folder / ONNX_FILE), torch.device("cpu"))
    same, count = _compared(found, record)
    return f"{same:,} of the record's {count:,} validation predictions, in ONNX Runtime {version('onnxruntime')}"


class _Text(nn.Module):
    """A text model with tensors as inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.inputs = model, ["input_ids"]
        self.outputs = ["start_logits", "end_logits"] if hasattr(model, "qa_outputs") else ["logits"]
        if isinstance(model, LanguageModel):
            self.model = model.model
        else:
            self.inputs += ["attention_mask", "token_type_ids"]
            model.encoder.feed_forward = nn.ModuleList(map(_EveryToken, model.encoder.feed_forward))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, inputs, strict=True)), use_cache=False)
        return tuple(output[name] for name in self.outputs)


class _EveryToken(nn.Module):
    """A dense layer run on padding too, which nothing reads: how many tokens are none has no place in a graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


def _metadata(model: nn.Module, task: Task, record: Record) -> dict[str, str]:
    """What a user of the file alone has to know, by name; values are JSON."""
    found = {"record": record.folder.name, "domain": record.config["domain"]}
    if isinstance(data := getattr(task, "data", None), ImageData):
        found |= {"in_chans": data.in_chans, "image_size": data.image_size, **data.preparation}
        found["label_names"] = data.classes
    else:
        config = model.model.config if isinstance(model, LanguageModel) else model.config
        found["max_length"] = config.max_position_embeddings
        if hasattr(model, "classifier"):
            found["label_names"] = [config.id2label[i] for i in range(config.num_labels)]
    return {name: json.dumps(value) for name, value in found.items()}


class _OnnxModel(nn.Module):
    """A file of :func:`write_onnx`, called as the study's tasks call their models."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.session = onnx_session(file)
        self.inputs, self.outputs = (
            [one.name for one in many] for many in (self.session.get_inputs(), self.session.get_outputs())
        )
        self.domain = json.loads(self.session.get_modelmeta().custom_metadata_map["domain"])

    def forward(
        self, x: Tensor, mask: Tensor | None = None, types: Tensor | None = None, predicted: Tensor | None = None
    ) -> Tensor | SimpleNamespace:
        given = [x]
        if self.domain == "text":
            given += [torch.ones_like(x) if mask is None else mask, torch.zeros_like(x) if types is None else types]
        fed = {name: tensor.numpy() for name, tensor in zip(self.inputs, given, strict=True)}
        found = map(torch.from_numpy, self.session.run(self.outputs, fed))
        output = SimpleNamespace(**dict(zip(self.outputs, found, strict=True)))
        if self.domain == "text":
            if predicted is not None:
                output.logits = output.logits[predicted]
            return output
        return output.logits[:, :-1] if self.domain == "language" else output.logits


def _compared(found: Mapping[str, Tensor], record: Record) -> tuple[int, int]:
    """How many of a task's predictions are the record's, and how many there are: of the kind with the most others."""
    same = {n: torch.isclose(t, record.predictions[n], rtol=1e-3, atol=1e-3) for n, t in found.items()}
    name, least = min(same.items(), key=lambda item: item[1].double().mean())
    count, others = len(least), int((~least).sum())
    if others > count / ODD:
        raise ValueError(
            f"{ONNX_FILE}: expected the record's predictions in ONNX Runtime, found {others:,} others of {count:,} ({name}):"
            f" {record.folder}"
        )
    return count - others, count
