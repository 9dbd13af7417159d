"""Reconstruction of a twin's layers on a stream of tokens: what it minimises, what it gains, interruptions, memory."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from test_checkpoints import close, files, logits, quiet, stop  # noqa: F401  quiet is a fixture
from tiny_moes import moe

from ones_lib.checkpoints import convert, evaluation, reconstruction, work
from ones_lib.checkpoints.__main__ import _report, main
from ones_lib.checkpoints.reconstruction import LayerTokens
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stream import Slices
from ones_lib.checkpoints.work import Work
from ones_lib.models.causal import load_language_model, watched_experts

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v3", "glm4_moe", "granitemoe", "gpt_oss"]
KINDS += ["qwen3_5_moe", "nemotron_h", "step3p7", "lfm2_moe", "llama4_text"]
IDS = torch.randint(3, 64, (192, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few steps, and slices of few tokens, so that there are many."""
    monkeypatch.setattr(reconstruction, "LEAST_STEPS", 12)
    monkeypatch.setattr(reconstruction, "REPORT_EVERY", 4)
    monkeypatch.setattr(reconstruction, "SAVE_EVERY", 4)
    monkeypatch.setattr("ones_lib.checkpoints.stream.TOKENS_A_SLICE", 192)


def reconstructed(source, destination, method="readout", **options):
    return convert(source, destination, method, "active", calibration=IDS, reconstruct=IDS, **options)


# --- what it sees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student_inputs", [False, True])
def test_a_layer_is_fitted_to_the_teachers_output_or_residual_stream(student_inputs, tmp_path, monkeypatch):
    """The tokens on disk against forward passes of whole models: of the MoE, and of the twin that comes out."""
    seen = {}

    def note(start, tokens, *arguments):
        found = [tokens.slices.read(number) for number in range(tokens.count)]
        seen[len(seen)] = [torch.cat([part[name] for part in found]) for name in ("inputs", "targets")]
        return start, [{"tokens": 0, "error": 0.5}]

    monkeypatch.setattr(reconstruction, "regress", note)
    model = moe("qwen3_moe", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "moe")
    reconstructed(tmp_path / "moe", tmp_path / "dense", "topk", student_inputs=student_inputs)
    ids = IDS[torch.randperm(192, generator=torch.Generator().manual_seed(0))]
    layers = {}
    with torch.no_grad(), watched_experts(model, lambda block, found: layers.update({block: found})):
        model(ids)
    first, second, _ = layers
    inputs, targets = seen[0]
    close(inputs, layers[first].inputs)
    close(targets, layers[first].outputs)
    inputs, targets = seen[1]
    if not student_inputs:
        close(inputs, layers[second].inputs)
        close(targets, layers[second].outputs)
        return
    twin, found, place = load_language_model(tmp_path / "dense"), {}, int(second.split(".")[2])
    twin.model.layers[place].mlp.register_forward_hook(
        lambda module, x, y: found.update(inputs=x[0].flatten(0, 1), outputs=y.flatten(0, 1))
    )
    with torch.no_grad():
        after = twin(ids, output_hidden_states=True).hidden_states[place + 1].flatten(0, 1)
        wanted = model(ids, output_hidden_states=True).hidden_states[place + 1].flatten(0, 1)
    close(inputs, found["inputs"])
    close(targets, wanted - (after - found["outputs"]))  # with it, the twin would be where the MoE is


def test_batches_go_through_all_tokens_in_another_order_each_time(tmp_path, monkeypatch):
    slices, rows = Slices(tmp_path), torch.arange(60.0)[:, None]
    for number in range(20):
        slices.write(number, {"inputs": rows[3 * number :][:3], "targets": -rows[3 * number :][:3]})
    tokens = LayerTokens(slices, 20, torch.relu, torch.device("cpu"))
    assert tokens.trained == 19
    assert [int(part.inputs[0]) for part in tokens.held_out()] == [57]
    batches = tokens.batches(3, 0)
    first, second = ([next(batches) for _ in range(19)] for _ in range(2))
    for some in (first, second):
        assert sorted(torch.cat([x for x, _ in some]).flatten().tolist()) == list(range(57))
        assert all(torch.equal(x, -y) for x, y in some)
    assert not torch.equal(first[0][0], second[0][0])
    later = tokens.batches(3, 23)
    assert all(torch.equal(next(later)[0], x) for x, _ in second[4:])
    assert len(list(tokens.solved(1000))) == 19
    monkeypatch.setattr(reconstruction, "SOLVED", 3)
    assert [int(part.inputs[0]) for part in tokens.solved(3)] == [0, 18, 36]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_causal_architecture_gets_nearer_to_its_moe(kind, tmp_path):
    """Experts with something in common, which a network of active width can learn."""
    model = moe(kind)
    model.save_pretrained(tmp_path / "moe")
    students = [False] if kind in ("flex_olmo", "nemotron_h") else [False, True]  # these change what their experts give
    for student_inputs in students:
        out = tmp_path / f"dense-{student_inputs}"
        table = reconstructed(tmp_path / "moe", out, "topk", student_inputs=student_inputs)
        course = pd.read_csv(out / "reconstruction.csv")
        for layer, errors in course.groupby("layer")["error"]:
            assert errors.iloc[-1] < errors.iloc[0], layer
            assert errors.iloc[-1] == pytest.approx(table.set_index("layer")["reconstruction_error"][layer])
        assert logits(load_language_model(out)).isfinite().all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"dense-{s}" for s in students), "moe"]


@pytest.mark.parametrize("student_inputs", [False, True])
@pytest.mark.parametrize(
    "kind", ["glm4_moe", "laguna", "solar_open", "openai_privacy_filter", "qwen3_5_moe", "granitemoeshared"]
)
def test_equal_experts_are_found_exactly(kind, student_inputs, tmp_path):
    """With factors behind the experts, of which one depends on their number, several experts in the twin, and shared ones that are
    gated, or stand beside the MoE layer."""
    model = moe(kind, equal=True)
    model.save_pretrained(tmp_path / "moe")
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", "average", student_inputs=student_inputs)
    assert (table["reconstruction_error"] < 1e-4).all()
    close(logits(load_language_model(tmp_path / "dense")), logits(model), atol=1e-3)


def test_the_end_to_end_error_is_what_the_last_layer_reports(tmp_path):
    """On student inputs, the target is the teacher's residual stream: its error is that of the twin's last hidden state."""
    model = moe("mixtral")
    model.save_pretrained(tmp_path / "moe")
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", student_inputs=True)
    twin, found = load_language_model(tmp_path / "dense"), {}
    twin.model.layers[-1].mlp.register_forward_hook(lambda module, x, y: found.update(outputs=y))
    held_out = IDS[torch.randperm(192, generator=torch.Generator().manual_seed(0))][-12:]
    states = []
    for m in (model, twin):
        hook = m.model.norm.register_forward_pre_hook(lambda module, x: states.append(x[0]))
        with torch.no_grad():
            m(held_out)
        hook.remove()
    error, size = (states[0] - states[1]).norm(), (states[0] - states[1] + found["outputs"]).norm()
    assert table["reconstruction_error"].iloc[-1] == pytest.approx((error / size).item(), rel=1e-3)


def test_both_errors_of_a_layer_are_of_the_same_targets(tmp_path, capsys):
    """That before the reconstruction is the gathered network's, which a conversion without one makes, on the held-out tokens."""
    model = moe("mixtral")
    model.save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "gathered", "topk", "active", calibration=IDS)
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", "topk", student_inputs=False)
    assert "output_error" not in table
    twin, found = load_language_model(tmp_path / "gathered"), {}
    held_out = IDS[torch.randperm(192, generator=torch.Generator().manual_seed(0))][-12:]
    with torch.no_grad(), watched_experts(model, found.__setitem__):
        model(held_out)
    for row, layer in zip(table.itertuples(), twin.model.layers, strict=True):
        seen = found[f"{row.layer}.experts"]
        with torch.no_grad():
            error = (layer.mlp(seen.inputs) - seen.outputs).norm() / seen.outputs.norm()
        assert row.start_error == pytest.approx(error.item(), rel=1e-3)
        assert row.reconstruction_error < row.start_error
    printed = _report(table, json.loads((tmp_path / "dense" / "conversion.json").read_text()))
    assert re.search(r"gate_sum +error before +error after\n", printed)


def test_bfloat16_is_computed_on_as_it_is_stored(tmp_path):
    moe("qwen3_moe").bfloat16().save_pretrained(tmp_path / "moe")
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", student_inputs=True)
    course = pd.read_csv(tmp_path / "dense" / "reconstruction.csv").groupby("layer", sort=False)["error"]
    assert (course.last() <= course.first()).all()
    assert (course.last() < course.first()).any()
    assert table["reconstruction_error"].lt(1).all()
    assert all(t.dtype == torch.bfloat16 for t in load_language_model(tmp_path / "dense").state_dict().values())


# --- interruptions, memory, bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["write", "take_step", "save_tensors"])
@pytest.mark.parametrize(("kind", "layers"), [("glm4_moe", 3), ("mixtral", 4)])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(kind, layers, where, tmp_path, monkeypatch):
    """At the n-th slice, step or file, for many n; each time it goes on. A dense layer first, and several MoE layers."""
    moe(kind, num_hidden_layers=layers).save_pretrained(tmp_path / "moe")
    reconstructed(tmp_path / "moe", tmp_path / "whole", student_inputs=True)
    owner = {"write": Slices, "take_step": reconstruction._State, "save_tensors": reconstruction}[where]
    function, left, stops = getattr(owner, where), [0], 0

    def stopping(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(owner, where, stopping)
    done = False
    while not done:
        left[0] = 7 if where != "save_tensors" else 2
        try:
            reconstructed(tmp_path / "moe", tmp_path / "dense", student_inputs=True)
            done = True
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert files(tmp_path / "dense") == files(tmp_path / "whole")
    courses = [(tmp_path / name / "reconstruction.csv").read_text() for name in ("dense", "whole")]
    assert courses[0] == courses[1]


LIMITED = """
import os, resource, sys, torch
from ones_lib.checkpoints import reconstruction, stream
from ones_lib.checkpoints import convert
reconstruction.LEAST_STEPS, reconstruction.REPORT_EVERY = 20, 20
stream.TOKENS_A_SLICE = 1024
for rows in map(int, sys.argv[3:]):
    if not os.fork():  # each in a process of its own, which has imported what it takes
        ids = torch.randint(3, 64, (rows, 64), generator=torch.Generator().manual_seed(0))
        convert(sys.argv[1], f"{sys.argv[2]}{rows}", "topk", "active", calibration=ids[:32], reconstruct=ids)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """Twice the tokens of what is in memory, and eight times."""
    moe("qwen3_moe", hidden_size=256, vocab_size=64).save_pretrained(tmp_path / "moe")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "moe"), str(tmp_path / "dense"), "256", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(line) / 1024 for line in done.stdout.split()]
    assert len(peaks) == 2
    more = 768 * 64 * 256 * 4 / 2**20  # MB of hidden states, of which seven are on disk
    assert peaks[1] < peaks[0] + 0.5 * more


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("muse_spark_text", {"reconstruct": IDS}, "reconstruct: expected experts whose outputs are added as they are"),
        ("zaya", {"reconstruct": IDS}, "reconstruct: expected a causal model whose blocks hand on"),
        ("nemotron_h", {"reconstruct": IDS, "student_inputs": True}, "student_inputs: expected blocks that add"),
        ("switch_transformers", {"reconstruct": IDS}, "reconstruct: expected a causal model"),
        ("flex_olmo", {"reconstruct": IDS, "student_inputs": True}, "student_inputs: expected blocks that add"),
        ("mixtral", {"student_inputs": True}, "student_inputs: expected a text to reconstruct on"),
        ("mixtral", {"student_inputs": False}, "student_inputs: expected a text to reconstruct on"),
        ("mixtral", {"reconstruct_tokens": 4096}, "reconstruct_tokens: expected a text to reconstruct on"),
        ("mixtral", {"reconstruct": IDS[:7]}, "reconstruct_tokens: expected at least 8 blocks of 16 tokens, found 7"),
    ],
)
def test_what_can_not_be_reconstructed_is_said_first(kind, options, message, tmp_path):
    moe(kind).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=IDS, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe"]


@pytest.mark.parametrize(("kind", "can"), [("mixtral", True), ("flex_olmo", False), ("nemotron_h", False)])
def test_student_inputs_are_taken_where_the_blocks_allow_it(kind, can, tmp_path, monkeypatch):
    """A call without the argument is one with the value that it takes: in the records, and for what is begun or done."""
    moe(kind).save_pretrained(tmp_path / "moe")
    with monkeypatch.context() as patch:
        stop(patch, reconstruction._State, "take_step", 15)
        with pytest.raises(KeyboardInterrupt):
            reconstructed(tmp_path / "moe", tmp_path / "dense", "topk", student_inputs=can)
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", "topk")
    assert json.loads((tmp_path / "dense" / "conversion.json").read_text())["student_inputs"] is can
    card = (tmp_path / "dense" / "README.md").read_text()
    assert ("from the student's own inputs" in card, "from the MoE's inputs" in card) == (can, not can)
    monkeypatch.setattr(Work, "begin", None)  # all is done
    for same in (can, None):
        found = reconstructed(tmp_path / "moe", tmp_path / "dense", "topk", student_inputs=same)
        assert found["reconstruction_error"].tolist() == pytest.approx(table["reconstruction_error"].tolist())
    with pytest.raises(FileExistsError, match=f"student_inputs {can}, now {not can}".lower()):
        reconstructed(tmp_path / "moe", tmp_path / "dense", "topk", student_inputs=not can)


@pytest.mark.parametrize(("kind", "size", "can"), [("mixtral", 10_000, True), ("flex_olmo", 1, False)])
def test_neither_rounding_nor_a_norm_without_weights_deceives(kind, size, can, tmp_path, monkeypatch):
    """Embeddings are so large that bfloat16 rounds off what a layer adds; the width is such that a norm looks like a factor."""
    model = moe(kind, hidden_size=512, num_hidden_layers=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1)
        model.get_input_embeddings().weight.mul_(size)
    model.bfloat16().save_pretrained(tmp_path / "moe")
    seen = []

    def note(self, ids):
        seen.append(self.arguments["student_inputs"])
        raise KeyboardInterrupt

    monkeypatch.setattr(Work, "begin", note)
    with pytest.raises(KeyboardInterrupt):
        reconstructed(tmp_path / "moe", tmp_path / "dense")
    assert seen == [can]


def test_a_weight_that_is_nan_is_named_before_a_block_runs(tmp_path):
    model = moe("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*expected finite"):
        reconstructed(tmp_path / "moe", tmp_path / "dense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe"]


@pytest.mark.parametrize(
    ("typed", "given"), [([], None), (["--student-inputs"], True), (["--no-student-inputs"], False)]
)
def test_student_inputs_on_the_command_line(typed, given, monkeypatch):
    seen = {}

    def note(**arguments):
        seen.update(arguments)
        raise ValueError("noted")

    monkeypatch.setattr("ones_lib.checkpoints.__main__.convert", note)
    with pytest.raises(SystemExit):
        main(["convert", "moe", "dense", "--reconstruct", "names", *typed])
    assert seen["student_inputs"] is given


def test_layers_that_are_done_are_not_thrown_away_by_another_call(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    take_step, left = reconstruction._State.take_step, [30]  # in the third layer

    def stopping(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        take_step(*arguments)

    monkeypatch.setattr(reconstruction._State, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        reconstructed(tmp_path / "moe", tmp_path / "dense")
    with pytest.raises(FileExistsError, match=r"\.dense\.converting: expected unfinished work of the same arguments"):
        reconstructed(tmp_path / "moe", tmp_path / "dense", student_inputs=False)
    reconstructed(tmp_path / "moe", tmp_path / "dense")


CALL = {"method": "topk", "d_ff": "active", "calibration": IDS, "reconstruct": IDS, "check": IDS[:4]}
#: The n-th call of what fails, and how.
STOPS = [
    (Slices, "write", 9, KeyboardInterrupt),  # of the calibration
    (reconstruction._State, "take_step", 15, ValueError),
    (reconstruction, "save_tensors", 2, MemoryError),
    (Work, "convert_block", 3, TypeError),
    (Shards, "join", 1, OSError),
    (evaluation, "token_losses", 1, RuntimeError),
    (Work, "finish", 1, KeyboardInterrupt),
]
CHANGES = [{}, {"method": "contribution_topk"}, {"d_ff": 31}, {"importance": "product"}, {"student_inputs": False}]
CHANGES += [{"check": IDS[4:8]}, {"check": None}, {"calibration": IDS.flip(1)}, {"reconstruct": IDS.flip(1)}]


@pytest.mark.parametrize(
    ("at", "change"), [(i % len(STOPS), i) for i in range(len(CHANGES))] + [(i, 0) for i in range(1, len(STOPS))]
)
def test_stopped_anywhere_and_called_with_another_argument_it_is_as_if_fresh_or_refused(
    at, change, tmp_path, monkeypatch
):
    moe("mixtral", num_hidden_layers=2).save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(work, "fits_memory", lambda shards: False)
    owner, name, number, error = STOPS[at]
    with monkeypatch.context() as patch:
        stop(patch, owner, name, number, error)
        with pytest.raises(error):
            convert(tmp_path / "moe", tmp_path / "dense", **CALL)
    call = CALL | CHANGES[change]
    if CHANGES[change].keys() <= {"check"}:
        table = convert(tmp_path / "moe", tmp_path / "dense", **call)
    else:
        with pytest.raises(FileExistsError, match="expected unfinished work of the same arguments, found others"):
            convert(tmp_path / "moe", tmp_path / "dense", **call)
        call = CALL
        table = convert(tmp_path / "moe", tmp_path / "dense", **call)  # nothing was lost
    fresh = convert(tmp_path / "moe", tmp_path / "fresh", **call)
    assert files(tmp_path / "dense") == files(tmp_path / "fresh")
    assert table.attrs == fresh.attrs


def test_steps_that_diverge_leave_the_solved_readout(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(reconstruction, "LEARNING_RATE", 1e30)
    table = reconstructed(tmp_path / "moe", tmp_path / "dense", "topk")
    assert table["reconstruction_error"].lt(1).all()
    assert logits(load_language_model(tmp_path / "dense")).isfinite().all()


def test_few_tokens_are_said(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.warns(
        UserWarning, match="reconstruct_tokens: expected at least 4 for each of the 48 hidden units, found 128"
    ):
        convert(tmp_path / "moe", tmp_path / "dense", "readout", "active", calibration=IDS, reconstruct=IDS[:8])


def test_a_full_disk_is_said_before_the_tokens_are_written(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "ones_lib.checkpoints.reconstruction.shutil.disk_usage", lambda path: usage._replace(free=10**7)
    )
    monkeypatch.setattr("ones_lib.checkpoints.work.shutil.disk_usage", lambda path: usage._replace(free=10**7))
    with pytest.raises(OSError, match=r"free disk space, found .*reconstruct_tokens 0\.1"):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=IDS, reconstruct=IDS.repeat(40, 1))


def test_what_was_done_is_in_the_conversions_facts(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    reconstructed(tmp_path / "moe", tmp_path / "dense", student_inputs=True)
    facts = json.loads((tmp_path / "dense" / "conversion.json").read_text())
    assert (facts["d_ff"], facts["reconstruct_tokens"], facts["student_inputs"]) == (48, IDS.numel(), True)
    assert (facts["model_type"], facts["vocab_size"]) == ("mixtral", 64)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "every network was regressed, on 3,072 tokens, onto the MoE's residual stream" in card
    found = pd.read_csv(tmp_path / "dense" / "conversion.csv")
    before, after = (
        f"{found[name].min():.3f} to {found[name].max():.3f}" for name in ("start_error", "reconstruction_error")
    )
    assert f"by layer, before {before} and after {after}" in card
