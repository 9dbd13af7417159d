"""The explorer without a browser: what its controls show and save (the browser is in test_notebooks.py)."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_bank
from PIL import Image
from safetensors.torch import save_file

from ones_lib import gather, spectra
from ones_lib.checkpoints.activations import split_tokens
from ones_lib.gathering import registry as gathering
from ones_lib.study.records import Records
from ones_lib.views import explorer, figures
from ones_lib.views.explorer import VIEWS, Explorer, moe_records


def picture(view, explored):
    data = re.search(r"base64,([^\"]*)", explored._pictures[view].widget.value)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))


def status(explored):
    return re.sub(r"<[^>]*>", "", explored.status.value)


@pytest.fixture
def explored(tiny_record, tmp_path):
    record, cache_dir = tiny_record
    return Explorer({"tiny": record}, cache_dir, tmp_path / "saved")


@pytest.fixture
def weights_file(tmp_path):
    bank = random_bank(12, gated=True)
    tensors = {f"layers.{i}.{name}": t + i for i in range(2) for name, t in bank.tensors()}
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", bank


def test_a_move_of_the_rank_changes_what_depends_on_it(explored):
    assert status(explored).startswith("ready")
    before = {view: picture(view, explored) for view in VIEWS}
    numbers = explored.numbers.value
    explored.rank.value += 1
    for view in VIEWS:
        assert not np.array_equal(picture(view, explored), before[view]), view
    assert explored.numbers.value != numbers


@pytest.mark.parametrize("scale", ["linear", "log", "energy"])
def test_moved_pictures_are_those_drawn_afresh(tiny_record, tmp_path, scale):
    """What is drawn on a kept background is, pixel by pixel, what drawing everything would give."""
    record, cache_dir = tiny_record
    moved, fresh = (Explorer({"tiny": record}, cache_dir, tmp_path) for _ in range(2))
    for explored in (moved, fresh):
        explored.rank.value = 8
        explored.scale.value = scale
    for rank in (7, 1, 5, 2):
        moved.rank.value = rank
    fresh.rank.value = 2
    for view in VIEWS:
        ours, theirs = picture(view, moved), picture(view, fresh)
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs), view


def test_numbers_are_those_of_the_library(explored):
    explored.matrix.value, explored.rank.value, explored.method.value = "down", 3, "topk"
    table = spectra.spectrum(explored.factored, ["down"])
    energy = 100 * table[table["rank"] == 3]["energy"]
    text = re.sub(r"<[^>]*>", " ", explored.numbers.value)
    assert f"energy kept at rank 3, %  {energy.mean():.1f} ({energy.min():.1f} to {energy.max():.1f})" in text
    _, seen = split_tokens(explored.activations[explored.layer.value])
    error = spectra.output_error(explored.factored.gather("topk", 3), seen)
    assert f"Top-KG: output error  {error['error']:.3f}" in text


def test_a_method_of_ones_own_is_there_too(tiny_record, tmp_path, monkeypatch):
    methods = {**gathering._METHODS, "median": lambda bank, *, scale=1.0: bank.map(lambda t: t.quantile(0.5, dim=0))}
    monkeypatch.setattr(gathering, "_METHODS", methods)
    record, cache_dir = tiny_record
    explored = Explorer({"tiny": record}, cache_dir, tmp_path)
    explored.method.value = "median"
    assert status(explored).startswith("ready")
    assert "median: distance from the router-weighted mean" in explored.numbers.value


def test_chosen_experts_alone_are_shown(explored):
    explored.experts.value = (1, 3)
    assert set(explored.tables["energy"]["expert"]) == {1, 3}
    assert set(explored.tables["overlap"]["other"]) == {1, 3}
    explored.experts.value = ()
    assert "experts: expected at least one to be chosen, found none" in status(explored)
    assert 'data-state="error"' in explored.status.value
    explored.experts.value = (0,)
    assert status(explored).startswith("ready")


def test_a_file_by_its_path(explored, weights_file):
    path, bank = weights_file
    explored.path.value = str(path)
    assert explored.source.value == str(path)
    assert explored.layer.options == ("layers.0", "layers.1")
    assert [value for _, value in explored.matrix.options] == ["up", "gate", "down"]
    assert explored.experts.value == tuple(range(12))
    assert "it needs a model from the records" in explored._pictures["output_error"].widget.value
    explored.layer.value = "layers.1"
    assert torch.equal(explored.factored.bank.up, (bank.up + 1).double())
    explored.source.value = "tiny"  # and back
    assert "output error" in explored.numbers.value


def test_a_bad_path_is_said_and_changes_nothing(explored):
    numbers = explored.numbers.value
    explored.path.value = "/no/such/model.safetensors"
    assert "/no/such/model.safetensors: expected a safetensors file" in status(explored)
    assert (explored.source.value, explored.numbers.value) == ("tiny", numbers)


def test_with_nothing_to_show_it_asks_for_a_file(weights_file):
    explored = Explorer({})
    explored.rank.value = 2
    assert "model: expected one to be open, found none; give the path of a file" in status(explored)
    explored.path.value = str(weights_file[0])
    assert "effective rank" in explored.numbers.value


def test_a_record_whose_data_are_gone_still_shows_its_weights(tiny_record, tmp_path, monkeypatch):
    record, cache_dir = tiny_record

    def gone(*_):
        raise FileNotFoundError("data_dir: expected a folder, found none")

    monkeypatch.setattr(explorer, "record_activations", gone)
    explored = Explorer({"tiny": record}, cache_dir, tmp_path)
    assert "no output error: data_dir: expected a folder" in explored._pictures["output_error"].widget.value
    assert "effective rank" in explored.numbers.value
    explored.save.click()
    assert not list((tmp_path).rglob("output_error.csv"))


def test_a_bad_source_names_itself_before_anything_is_shown(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a safetensors file or a folder of them"):
        Explorer({"gone": tmp_path / "gone"})


def test_a_large_layer_waits_for_the_release_of_the_slider_and_says_what_it_does(weights_file, monkeypatch):
    monkeypatch.setattr(explorer, "SMALL", 1)
    said = []
    monkeypatch.setattr(Explorer, "_say", lambda self, text, state: said.append((state, text)))
    explored = Explorer({"file": weights_file[0]})
    assert not explored.rank.continuous_update
    assert ("busy", "⏳ factoring 12 experts of 12 x 8 …") in said


def test_a_large_layers_errors_are_those_looked_at(tiny_record, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "SMALL", 1)
    record, cache_dir = tiny_record
    explored = Explorer({"tiny": record}, cache_dir, tmp_path)
    explored.rank.value, explored.method.value = 5, "average"
    seen = set(zip(explored.tables["output_error"]["method"], explored.tables["output_error"]["rank"], strict=True))
    assert seen == {("svd", 2), ("svd", 5), ("average", 5)}


def errors_shown(explored):
    """Of each gathering in the view of the output error, for the methods that see data."""
    table = explored.tables["output_error"]
    return {m: part for m, part in table[table["method"].isin(["readout", "fit"])].groupby("method")}


def test_a_readout_stands_beside_the_papers_methods_at_the_chosen_width(explored):
    given, held_out = split_tokens(explored.activations[explored.layer.value])
    assert explored.width.options == (12, 24, 36, 48)
    before = picture("output_error", explored)
    for width in (12, 36):
        explored.width.value = width
        shown = errors_shown(explored)
        assert set(shown) == {"readout"}  # a fit takes long, so it is made when it is chosen
        ffn = gather(explored.factored.bank, "readout", given, d_ff=width)
        assert shown["readout"]["error"].unique() == pytest.approx([spectra.output_error(ffn, held_out)["error"]])
        assert (shown["readout"]["d_ff"] == width).all()
    methods = set(explored.tables["output_error"]["method"])
    assert {"sum", "average", "topk", "svd", "readout"} <= methods
    assert not np.array_equal(picture("output_error", explored), before)
    explored.width.value = 12
    assert np.array_equal(picture("output_error", explored), before)


def test_a_fit_is_made_when_it_is_chosen_and_once(explored, monkeypatch):
    calls = []
    real = explorer.gather
    monkeypatch.setattr(
        explorer,
        "gather",
        lambda bank, method, *args, **options: calls.append((method, options)) or real(bank, method, *args, **options),
    )
    explored.method.value = "fit"
    assert status(explored).startswith("ready")
    shown = errors_shown(explored)
    assert set(shown) == {"readout", "fit"}
    assert "layer-wise fit, 12 hidden units: output error" in explored.numbers.value
    assert f"{shown['fit']['error'].iloc[0]:.3f}" in explored.numbers.value
    explored.rank.value += 1
    explored.matrix.value = "down"
    explored.method.value = "svd"
    assert set(errors_shown(explored)) == {"readout", "fit"}  # it stays in the picture
    explored.method.value = "fit"
    assert calls == [("fit", {"d_ff": 12, "steps": explorer.FIT_STEPS})]
    explored.width.value = 24
    assert set(errors_shown(explored)["fit"]["d_ff"]) == {24}
    assert [options["d_ff"] for method, options in calls if method == "fit"] == [12, 24]


def test_without_activations_no_readout_is_offered(explored, weights_file):
    explored.method.value, explored.width.value = "readout", 24
    explored.path.value = str(weights_file[0])
    assert not {"readout", "fit"} & {value for _, value in explored.method.options}
    assert explored.method.value == "svd"
    assert explored.width.disabled
    explored.source.value = "tiny"
    assert {"readout", "fit"} <= {value for _, value in explored.method.options}
    assert not explored.width.disabled
    assert explored.width.value == 12


def test_a_large_layer_has_readouts_of_one_width_at_a_time(tiny_record, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "SMALL", 1)
    record, cache_dir = tiny_record
    explored = Explorer({"tiny": record}, cache_dir, tmp_path)
    assert not errors_shown(explored)
    explored.method.value = "readout"
    explored.rank.value = 5
    assert errors_shown(explored)["readout"]["rank"].to_list() == [2, 5]
    explored.width.value = 48
    assert errors_shown(explored)["readout"][["rank", "d_ff"]].to_numpy().tolist() == [[5, 48]]
    explored.method.value = "svd"
    explored.width.value = 24
    assert not errors_shown(explored)
    assert status(explored).startswith("ready")


def test_saved_figures_have_all_endings_and_the_tables_shown(explored, tmp_path):
    explored.rank.value = 3
    explored.save.click()
    (folder,) = (tmp_path / "saved").iterdir()
    assert folder.name == "tiny_blocks.0.mlp_up_svd_K3_d12"
    assert {p.name for p in folder.iterdir()} == {f"{v}.{e}" for v in VIEWS for e in ("png", "pdf", "csv", "json")}
    table = pd.read_csv(folder / "overlap.csv")
    pd.testing.assert_frame_equal(table, explored.tables["overlap"].reset_index(drop=True), atol=1e-6)
    assert str(folder) in status(explored)


def test_every_control_says_what_it_is(explored):
    controls = ("source", "path", "layer", "matrix", "experts", "method", "rank", "width")
    for name in controls:
        control = getattr(explored, name)
        assert control.description, name
        assert control.tooltip, name
    for view in VIEWS:
        assert re.search(r'<img alt="[a-z ]+"', explored._pictures[view].widget.value)


def test_records_by_names_for_people(tiny_record):
    record, _ = tiny_record
    (name,) = moe_records(Records(record.folder.parent), [record.folder.name])
    assert name == f"glyphs, 4 experts, seed 0 ({record.folder.name[-4:]})"


def test_views_are_plain_functions_of_tables(explored):
    fig = figures.energy_by_expert(explored.tables["energy"], rank=2)
    heights = [bar.get_height() for bar in fig.axes[0].patches]
    table = explored.tables["energy"]
    np.testing.assert_allclose(heights, 100 * table[table["rank"] == 2]["energy"])
