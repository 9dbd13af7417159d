"""Figures show what their tables hold, and are saved with them."""

import json
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ones_lib.gathering import registry as gathering
from ones_lib.study.tables import error_correlations
from ones_lib.views import figures

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def retention_rows(**changes):
    rows = []
    for reference in ("dense", "dense_long"):
        for model, value in {"sum": 0.1, "topk": 0.6, "shared_kd": 0.5}.items():
            for budget in (100, 400):
                row = {"data": "glyphs", "model": model, "stage": "distilled", "budget": budget, "reference": reference}
                rows.append({**row, "retention": value, "low": value - 0.1, "high": value + 0.1, **changes})
    return pd.DataFrame(rows)


def texts(fig):
    found = [t.get_text() for ax in fig.axes for t in ax.texts]
    return " ".join([*found, fig.get_supxlabel()])


def test_curves_draw_the_tables_values():
    fig = figures.retention_curves(retention_rows(), "budget", "KD steps", log=True)
    assert len(fig.axes) == 2
    for ax in fig.axes:
        lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
        np.testing.assert_allclose(lines["Top-KG"], [60, 60])
        np.testing.assert_allclose(lines["shared weights only"], [50, 50])
        low, high = ax.get_ylim()
        assert low < 0 < 100 < high
    assert "bootstrap" in texts(fig)
    assert "undefined" not in texts(fig)


def benefit_rows():
    axes = [(m, e, s, seed) for m in ("average", "fit") for e in (4, 16) for s in (900, 1400) for seed in (0, 1)]
    table = pd.DataFrame(axes, columns=["model", "num_experts", "teacher_steps", "seed"])
    table["benefit"] = table["teacher_steps"] / 100 + table["seed"]
    return table.assign(data="glyphs", kept=table["benefit"] / 2 - (table["num_experts"] == 16))


def test_what_is_kept_is_drawn_against_the_benefit():
    fig = figures.kept_by_benefit(benefit_rows())
    assert [ax.get_title() for ax in fig.axes] == ["averaging", "layer-wise fit"]
    for ax in fig.axes:
        lines = {line.get_label(): line for line in ax.get_lines()}
        np.testing.assert_allclose(lines["16 experts"].get_xdata(), [9.5, 14.5])
        np.testing.assert_allclose(lines["16 experts"].get_ydata(), [3.75, 6.25])
        np.testing.assert_allclose(lines["4 experts"].get_ydata(), [4.75, 7.25])
    assert "MoEs trained for 900 and 1,400 steps" in texts(fig)


@pytest.mark.parametrize(
    "draw", [lambda r: figures.retention_curves(r, "budget", "KD steps"), figures.retention_by_model]
)
def test_undefined_retention_is_said_so(draw):
    rows = retention_rows(retention=math.nan, low=-math.inf, high=math.inf)
    if draw is figures.retention_by_model:
        rows = rows[rows["budget"] == 100]
    assert "undefined: the MoE is" in texts(draw(rows))
    assert (figures.retention_text(rows[rows["budget"] == 100]) == "undefined (MoE not above)").all(axis=None)


def test_unbounded_intervals_are_hollow_and_explained():
    rows = retention_rows(low=-math.inf, high=math.inf)
    fig = figures.retention_by_model(rows[rows["budget"] == 100])
    assert "hollow: no bounded interval" in texts(fig)
    assert "60% (unbounded)" in set(figures.retention_text(rows[rows["budget"] == 100]).to_numpy().ravel())


def test_accuracy_figure_has_every_model_once():
    rows = [
        {"model": model, "stage": stage, "seed": seed, "metric": "accuracy", "value": 50.0 + seed}
        for model, stage in [("moe", "trained"), ("dense", "trained"), ("dense_long", "trained"), ("topk", "gathered")]
        for seed in (0, 1)
    ]
    fig = figures.scores_by_model(pd.DataFrame(rows))
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["MoE (teacher)", "dense (teacher + KD steps)", "dense", "Top-KG"]
    means = [line.get_xdata() for line in fig.axes[0].get_lines() if line.get_label() == "trained"]
    np.testing.assert_allclose(np.concatenate(means), 50.5)


def test_scores_and_retention_have_a_panel_for_every_task():
    tasks = {"masked_lm": "loss", "answer": "f1", "average": "average"}
    models = [("moe", "trained"), ("dense", "trained"), ("dense_long", "trained"), ("topk", "distilled")]
    rows = [
        {"task": task, "metric": metric, "model": model, "stage": stage, "seed": seed, "value": 10.0 * i + seed}
        for i, (task, metric) in enumerate(tasks.items())
        for model, stage in models
        for seed in (0, 1)
    ]
    fig = figures.scores_by_model(pd.DataFrame(rows))
    assert [ax.get_title() for ax in fig.axes] == ["masked LM", "answer span", "average of the tasks"]
    assert [ax.get_xlabel() for ax in fig.axes] == ["loss (nats; lower is better)", "F1 (%)", "mean of the tasks (%)"]
    for i, ax in enumerate(fig.axes):
        (mean,) = (line.get_xdata() for line in ax.get_lines() if line.get_label() == "distilled")
        np.testing.assert_allclose(mean, 10 * i + 0.5)

    retention = pd.concat(
        [retention_rows().query("budget == 100 and reference == 'dense'").assign(task=task) for task in tasks]
    )
    retention.loc[retention["task"] == "answer", "retention"] = math.nan
    fig = figures.retention_by_model(retention, panels="task")
    assert [ax.get_title() for ax in fig.axes] == ["masked LM", "answer span", "average of the tasks"]
    assert ["undefined" in " ".join(t.get_text() for t in ax.texts) for ax in fig.axes] == [False, True, False]


@pytest.mark.parametrize(
    ("metric", "label"), [("accuracy", "validation accuracy (%)"), ("loss", "validation loss (nats; lower is better)")]
)
def test_learning_curves_draw_mean_and_range(metric, label):
    rows = [
        {"model": m, "seed": seed, "step": step, "value": v + seed}
        for m, v in (("moe", 3.0), ("dense", 1.0))
        for seed in (0, 1)
        for step in (10, 20)
    ]
    (ax,) = figures.learning_curves(pd.DataFrame(rows), metric).axes
    assert ax.get_ylabel() == label
    np.testing.assert_allclose([line.get_ydata() for line in ax.get_lines()], [[3.5, 3.5], [1.5, 1.5]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (3.0, 4.0)


def test_what_is_far_before_kd_does_not_press_the_others_together():
    values = [
        ("moe", "trained", 3.5),
        ("dense", "trained", 3.6),
        ("topk", "distilled", 3.55),
        ("topk", "gathered", 3.8),
    ]
    values += [("sum", "distilled", 3.6), ("sum", "gathered", 5.3)]
    rows = [{"model": m, "stage": s, "seed": 0, "metric": "loss", "value": v} for m, s, v in values]
    (ax,) = figures.scores_by_model(pd.DataFrame(rows)).axes
    assert ax.get_xlim()[1] < 4.1
    assert [text.get_text() for text in ax.texts] == ["5.3 →"]


def test_saved_with_csv_and_records_and_byte_stable(tmp_path):
    figures.set_style()
    table = pd.DataFrame({"model": ["moe"], "accuracy": [1 / 3], "record": ["moe-0123"]})
    contents = []
    for name in ("one", "two"):
        fig = figures.retention_curves(retention_rows(), "budget", "KD steps")
        figures.save_figure(fig, "f", table, tmp_path / name)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert set(contents[0]) == {"f.png", "f.pdf", "f.csv", "f.json"}
    assert contents[0] == contents[1]
    assert contents[0]["f.csv"] == b"model,accuracy\nmoe,0.333333\n"
    assert json.loads(contents[0]["f.json"]) == {"records": ["moe-0123"]}


def test_pdf_embeds_its_fonts_as_text(tmp_path):
    figures.set_style()
    figures.save_figure(
        figures.retention_curves(retention_rows(), "budget", "KD steps"), "f", retention_rows(), tmp_path
    )
    content = (tmp_path / "f.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content


def spectra_table(seeds=(0, 1), experts=3, matrices=("up", "down"), full=4):
    rows = []
    for data in ("glyphs", "names"):
        for seed in seeds:
            for matrix in matrices:
                for expert in range(experts):
                    values = [10.0 / (rank + expert + seed) for rank in range(1, full + 1)]
                    energy = np.cumsum(np.square(values)) / np.sum(np.square(values))
                    for rank, (value, part) in enumerate(zip(values, energy, strict=True), start=1):
                        row = {
                            "data": data,
                            "seed": seed,
                            "layer": "l",
                            "matrix": matrix,
                            "expert": expert,
                            "rank": rank,
                        }
                        rows.append({**row, "singular_value": value, "energy": part, "gaussian": 1.0})
    return pd.DataFrame(rows)


def test_spectra_draw_mean_and_range_and_the_noise_beside():
    table = spectra_table()
    fig = figures.spectra_by_data(table)
    assert [ax.get_title() for ax in fig.axes[:4]] == [
        "glyphs: up",
        "glyphs: down",
        "names: up",
        "names: down",
    ]
    part = table[(table["data"] == "names") & (table["matrix"] == "up")].groupby("rank")
    values, noise = fig.axes[2].get_lines()[:2]
    np.testing.assert_allclose(values.get_ydata(), part["singular_value"].mean())
    np.testing.assert_allclose(noise.get_ydata(), 1)
    kept, noise = fig.axes[6].get_lines()[:2]
    np.testing.assert_allclose(kept.get_ydata(), 100 * part["energy"].mean())
    np.testing.assert_allclose(noise.get_ydata(), [25, 50, 75, 100])  # four equal singular values
    band = fig.axes[2].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (table["singular_value"].min(), table["singular_value"].max())
    assert "mean over experts, 2 seeds; bands: lowest to highest" in texts(fig)


@pytest.mark.parametrize(("scale", "factor"), [("linear", 1), ("log", 1), ("energy", 100)])
def test_expert_spectra_have_a_line_each_and_the_gathered_one_moves(scale, factor):
    table = spectra_table(seeds=[0], matrices=["up"]).query("data == 'glyphs'")
    column = "energy" if scale == "energy" else "singular_value"

    def with_gathered(size):
        one = table[table["expert"] == 0].assign(expert="gathered")
        return pd.concat([table, one.assign(singular_value=size * one["singular_value"])])

    fig = figures.expert_spectra(with_gathered(0.5), scale, rank=2)
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    for expert, part in table.groupby("expert"):
        np.testing.assert_allclose(lines[f"expert {expert}"].get_ydata(), factor * part[column])
    again = figures.expert_spectra(with_gathered(0.25), scale, rank=3, on=fig)
    assert again is fig
    moved = {line.get_label(): line for line in figures.moving_artists(fig)}
    expected = with_gathered(0.25).query("expert == 'gathered'")
    np.testing.assert_allclose(moved["gathered"].get_ydata(), factor * expected[column])
    assert any(np.array_equal(line.get_xdata(), [3, 3]) for line in moved.values())
    assert len(moved) == 2
    # One that would leave the panel gets a new figure.
    assert (figures.expert_spectra(with_gathered(1000), scale, rank=3, on=fig) is fig) == (scale == "energy")


def overlap_table(experts=3):
    rows = [
        {"matrix": "up", "side": side, "rank": 2, "expert": i, "other": j, "overlap": 1.0 if i == j else 0.1 * (i + j)}
        for side in ("in", "out")
        for i in range(experts)
        for j in range(experts)
    ]
    return pd.DataFrame(rows).assign(chance=0.25)


@pytest.mark.parametrize("numbers", [True, False])
def test_heat_map_shows_the_table(numbers):
    fig = figures.overlap_heatmap(overlap_table(), numbers=numbers)
    for ax in fig.axes[:2]:
        np.testing.assert_allclose(ax.images[0].get_array(), [[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]])
        written = [t.get_text() for t in ax.texts]
        assert (written[:3] == [".10", ".20", ".30"]) == numbers
        assert "rank 2 (random: 0.25)" in written[-1]


def test_output_errors_and_distances_name_what_they_show():
    rows = [
        {
            "data": "glyphs",
            "seed": seed,
            "layer": "l",
            "method": method,
            "rank": rank,
            "error": 2.0 + seed,
            "rescaled": 0.95,
        }
        for seed in (0, 1)
        for method in ("one_expert", "average", "svd", "someones_own")
        for rank in (1, 4)
    ]
    fig = figures.output_errors(pd.DataFrame(rows))
    lines = {line.get_label(): line.get_ydata() for line in fig.axes[0].get_lines()}
    for name in ("one expert", "averaging", "SVD-KG", "someones own"):
        np.testing.assert_allclose(lines[name], 2.5)
    assert "grey: zero FFN" in texts(fig)
    assert "mean over 2 seeds" in texts(fig)

    rows = [
        {"data": "glyphs", "seed": 0, "layer": "l", "matrix": "up", "target": target, "distance": d, "cosine": 0.5}
        | {"method": method, "rank": rank}
        for target, d in (("expert 0", 1.0), ("expert 1", 3.0), ("router-weighted mean", 5.0))
        for method, rank in (("average", math.nan), ("svd", 1), ("svd", 4))
    ]
    fig = figures.gathered_distances(pd.DataFrame(rows))
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    np.testing.assert_allclose(
        lines["averaging, from the experts"].get_ydata(), [2, 2]
    )  # the experts' mean, at each end
    np.testing.assert_allclose(lines["averaging, from the experts"].get_xdata(), [1, 4])
    np.testing.assert_allclose(lines["SVD-KG, from the router-weighted mean"].get_ydata(), [5, 5])


def ablation_rows():
    """Two data sets; every variant's numbers follow from its place in the list and the seed."""
    variants = [
        ("topk", 1.0, math.nan),
        ("svd", "router", 4.0),
        ("joint_fit", None, math.nan),
        ("zero_ffn", None, math.nan),
    ]
    rows = []
    for i, (method, scale, rank) in enumerate(variants):
        for data in ("glyphs", "names"):
            for budget in (0, 10):
                for seed in (0, 1):
                    row = {"data": data, "method": method, "scale": scale, "rank": rank, "budget": budget, "seed": seed}
                    row |= {"accuracy": 10.0 * i + seed + budget, "layer_error": 4.0 - i}
                    row |= {"seconds": 2.0 * i + budget}
                    row |= {"retention": -0.5 * i + seed, "loss": 5 - i + seed if data == "names" else math.nan}
                    rows.append(row)
    return pd.DataFrame(rows)


def test_starts_have_a_row_a_variant_and_lines_for_what_was_trained():
    levels = [
        {"data": data, "metric": metric, "model": model, "value": value}
        for data, metric, moe, dense in (("glyphs", "accuracy", 70.0, 50.0), ("names", "loss", 1.0, 3.0))
        for model, value in (("moe", moe), ("dense", dense))
    ]
    fig = figures.gathering_starts(ablation_rows(), pd.DataFrame(levels))
    image, text = fig.axes
    labels = [label.get_text() for label in image.get_yticklabels()]
    assert labels == ["zero FFN", "Top-KG", "SVD-KG, router's scale, K = 4", "joint fit"]
    marks = [line for line in image.get_lines() if line.get_marker() not in ("|", "None")]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(30.5, 0), (0.5, 1), (10.5, 2), (20.5, 3)]
    assert [line.get_xdata()[0] for line in image.get_lines()[-2:]] == [70, 50]
    assert text.get_xlabel() == "loss (nats; lower is better)"
    assert "ticks: 2 seeds" in texts(fig)


def test_budgets_draw_the_means_of_methods_at_their_defaults():
    table = ablation_rows()
    fig = figures.gathering_budgets(table)
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    assert "SVD-KG" not in lines  # it is there at another scale alone
    np.testing.assert_allclose(lines["joint fit"].get_ydata(), [-50, -50])
    np.testing.assert_allclose(lines["Top-KG"].get_ydata(), [50, 50])
    assert lines["zero FFN"].get_linestyle() == "--"
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["0", "10"]


def test_times_are_those_of_gathering_and_kd():
    lines = {line.get_label(): line for line in figures.gathering_times(ablation_rows()).axes[0].get_lines()}
    assert "SVD-KG" not in lines
    np.testing.assert_allclose(lines["joint fit"].get_xdata(), [4, 14])
    np.testing.assert_allclose(lines["Top-KG"].get_xdata(), [0.1, 10])  # nothing stands before a tenth of a second
    np.testing.assert_allclose(lines["joint fit"].get_ydata(), [-50, -50])


def test_errors_stand_against_what_the_student_is_worth():
    table = ablation_rows()
    correlations = error_correlations(table)
    fig = figures.gathering_errors(table, correlations)
    start, later, text, _ = fig.axes
    marks = {line.get_label(): line for line in start.get_lines()}
    assert (marks["joint fit"].get_xdata()[0], marks["joint fit"].get_ydata()[0]) == (2.0, 20.5)
    marks = {line.get_label(): line for line in later.get_lines()}
    assert marks["joint fit"].get_ydata()[0] == -50
    assert start.get_title().startswith("glyphs, right after gathering\nrank correlation −1.00")
    assert later.get_title().startswith("glyphs, after 10 KD steps")
    assert text.get_ylabel().startswith("loss")
    assert correlations["correlation"].tolist() == pytest.approx(
        [-1, 1, 1, 1]
    )  # error falls, and so does retention here
    assert correlations["variants"].tolist() == [4] * 4


def test_gains_are_against_the_same_seeds_first_loss():
    values = {("KD", 0): 50.0, ("KD", 1): 60.0, ("more", 0): 51.0, ("more", 1): 63.0}
    rows = [
        {"model": "average", "stage": "distilled", "loss": loss, "seed": seed, "value": value}
        for (loss, seed), value in values.items()
    ]
    fig = figures.distillation_gains(pd.DataFrame(rows))
    (ax,) = fig.axes
    ticks = next(line for line in ax.get_lines() if line.get_marker() == "|")
    assert sorted(ticks.get_xdata()) == [1, 3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["more"]


def test_a_line_joins_the_widths_of_a_method():
    marks = {("moe", math.nan): (1.0, 1.0), ("dense", 8.0): (0.0, 2.0), ("dense_active", 16.0): (0.4, 1.5)}
    marks |= {("fit", 8.0): (0.5, 2.0), ("fit", 16.0): (0.9, 1.5)}
    rows = [
        {"model": m, "d_ff": d, "stage": "distilled" if m == "fit" else "trained", "retention": r, "speedup": s}
        | {"low": r - 0.1, "high": r + 0.1, "value": 50 + 10 * r, "value_sd": 1.0, "examples_per_second": 1000 * s}
        | {"batch_size": 4, "device": "CPU", "threads": 2}
        for (m, d), (r, s) in marks.items()
    ]
    table = pd.DataFrame(rows)
    fig = figures.retention_by_speed(table)
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    np.testing.assert_allclose(lines["layer-wise fit"].get_xdata(), [2, 1.5], rtol=0.02)
    np.testing.assert_allclose(lines["layer-wise fit"].get_ydata(), [50, 90])
    np.testing.assert_allclose(lines["dense, active width"].get_ydata(), [40])
    assert (*lines["MoE (teacher)"].get_xdata(), *lines["MoE (teacher)"].get_ydata()) == (1, 100)
    assert "16 hidden units (the active width) and 8 (one expert's)" in texts(fig)
    shown = figures.widths_text(table)
    assert shown.loc[("layer-wise fit", "16")].tolist() == ["59.0 ± 1.0", "90% (80 to 100)", "1,500", "1.50"]
    assert shown.loc["MoE (teacher)", "retention (95% interval)"].tolist() == [""]
    unknown = table.assign(retention=math.nan, low=-math.inf, high=math.inf)
    assert "undefined: the MoE is" in texts(figures.retention_by_speed(unknown))


def test_speed_is_a_ratio_with_the_ends_of_both_quartiles():
    times = {
        "dense": (2.0, 1.0, 4.0),
        "moe": (6.0, 4.0, 8.0),
        "moe_plain": (8.0, 8.0, 8.0),
        "moe_gshard": (9.0, 9.0, 9.0),
    }
    rows = [
        {"model": "m", "variant": variant, "batch_size": batch, "device": "CPU", "threads": 2}
        | dict(zip(("median_ms", "low_ms", "high_ms"), values, strict=True))
        | {"precision": "float32", "mode": "eager", "weight_bytes": 10 if variant == "dense" else 22}
        | {"flops": 100 if variant == "dense" else 150}
        for variant, values in times.items()
        for batch in (1, 8)
    ]
    table = pd.DataFrame(rows)
    assert (
        len(figures.inference_speed(pd.concat([table.assign(model=m) for m in "abc"])).axes) == 3
    )  # none is left empty
    (ax,) = figures.inference_speed(table).axes
    handles, labels = ax.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    np.testing.assert_allclose(drawn["this library's MoE"][0].get_ydata().astype(float), [3, 3])
    np.testing.assert_allclose(drawn["one-hot products (GShard)"][0].get_ydata().astype(float), [4.5, 4.5])
    bar = drawn["this library's MoE"][2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(bar, [4 / 4, 8 / 1])
    np.testing.assert_allclose(drawn["FLOPs, of the experts used"].get_ydata(), [1.5, 1.5])
    np.testing.assert_allclose(drawn["weights read, smallest batch"].get_ydata(), [2.2])


def test_ways_of_dispatch_are_drawn_over_this_librarys():
    times = {"ours": (2.0, 1.0, 4.0), "loop": (6.0, 4.0, 8.0), "batched_mm": (1.0, 1.0, 1.0)}
    rows = [
        {"layer": "l", "variant": variant, "precision": "float32", "direction": direction, "batch_size": batch}
        | dict(zip(("median_ms", "low_ms", "high_ms"), values, strict=True))
        | {"device": "CPU", "threads": 2}
        for variant, values in times.items()
        for direction in ("forward", "forward and backward")
        for batch in (1, 8)
        if (variant, batch) != ("batched_mm", 8)
    ]
    top, bottom = figures.dispatch_speed(pd.DataFrame(rows)).axes
    drawn = dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    assert [t.get_text() for t in bottom.get_yticklabels()] == ["8, f32", "1, f32"]
    np.testing.assert_allclose(drawn["plain loop"][0].get_xdata().astype(float), [3, 3])
    np.testing.assert_allclose(drawn["transformers, batched_mm"][0].get_xdata().astype(float), [0.5])
    np.testing.assert_allclose(drawn["plain loop"][2][0].get_segments()[0][:, 0], [1, 8])


def test_speed_in_engines_is_the_students_over_the_moes():
    seconds = {("an engine", "moe"): (6.0, 4.0, 8.0), ("an engine", "dense"): (2.0, 1.0, 4.0)}
    seconds |= {("limit", "moe"): (5.0, 5.0, 5.0), ("limit", "dense"): (1.0, 1.0, 1.0)}
    rows = [
        {"stack": stack, "engine": engine, "model": model, "phase": phase, "batch_size": batch}
        | dict(zip(("median_ms", "low_ms", "high_ms"), values, strict=True))
        | {"machine": "a machine", "threads": 2}
        for (engine, model), values in seconds.items()
        for stack in ("s", "t")
        for phase in ("prefill", "decoding")
        for batch in (1, 16)
    ]
    axes = figures.engine_speed(pd.DataFrame(rows)).axes
    assert [ax.get_title() for ax in axes] == ["s\ndecoding", "t\ndecoding", "s\nprefill", "t\nprefill"]
    drawn = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    np.testing.assert_allclose(drawn["an engine"][0].get_ydata().astype(float), [3, 3])
    np.testing.assert_allclose(drawn["an engine"][2][0].get_segments()[0][:, 1], [4 / 4, 8 / 1])
    np.testing.assert_allclose(drawn["memory and arithmetic"].get_ydata(), [5, 5])


def published_rows():
    """A student at 0 and 10 steps, an MoE and a baseline, of two MoEs, 2 seeds: ratios of perplexities, seconds."""
    ratios = {("moe", np.nan): 1.0, ("dense", np.nan): 1.3, ("mine", 0): 2.0, ("mine", 10): 1.1}
    rows = [
        {
            "teacher": teacher,
            "model": m,
            "budget": b,
            "seed": seed,
            "ratio": (r + seed / 10) * more,
            "seconds": b + 3 + seed,
        }
        for more, teacher in enumerate(("A", "B"), start=1)
        for seed in (0, 1)
        for (m, b), r in ratios.items()
    ]
    return pd.DataFrame(rows)


def frontier_tables():
    """The reconstruction at two widths and budgets, an MoE and baselines; and their speeds."""
    ratios = {("moe", None, np.nan): 1.0, ("dense", None, np.nan): 1.3, ("dense_width", "4x", np.nan): 1.2}
    ratios |= {("mine", "active", 0): 2.0, ("mine", "active", 10): 1.4, ("mine", "4x", 0): 1.5, ("mine", "4x", 10): 1.1}
    rows = [
        {"teacher": "A", "model": m, "width": w, "budget": b, "seed": seed, "ratio": r + seed / 10}
        for seed in (0, 1)
        for (m, w, b), r in ratios.items()
    ]
    speeds = pd.DataFrame({"teacher": "A", "width": ["moe", "active", "4x"], "speedup": [1.0, 3.0, 2.0]})
    return pd.DataFrame(rows), speeds


def test_perplexity_is_drawn_against_speed():
    fig = figures.frontier(*frontier_tables(), {0: "none", 10: "1%"})
    (ax,) = fig.axes
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(lines["none"], [[3, 2.05], [2, 1.55]])
    np.testing.assert_allclose(lines["1%"], [[3, 1.45], [2, 1.15]])
    np.testing.assert_allclose(lines["dense"], [[3, 1.35]])
    np.testing.assert_allclose(lines["dense, same width"], [[2, 1.25]])
    np.testing.assert_allclose(lines["MoE (teacher)"], [[1, 1]])
    assert {text.get_text() for text in ax.texts} >= {"active", "4x"}


def test_perplexity_is_drawn_against_tokens_and_against_time():
    fig = figures.perplexity_by_tokens(published_rows(), {0: "none", 10: "5k"})
    assert [ax.get_title() for ax in fig.axes] == ["A", "B"]
    for more, ax in enumerate(fig.axes, start=1):
        assert [t.get_text() for t in ax.get_xticklabels()] == ["none", "5k"]
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        np.testing.assert_allclose(lines["mine"], [2.05 * more, 1.15 * more])
        np.testing.assert_allclose(lines["MoE (teacher)"], 1.05 * more)
        np.testing.assert_allclose(lines["dense"], 1.35 * more)
    fig = figures.perplexity_by_time(published_rows())
    lines = {line.get_label(): line.get_xydata() for line in fig.axes[0].lines}
    np.testing.assert_allclose(lines["mine"], [[3.5, 2.05], [13.5, 1.15]])


def test_figures_are_a_papers_columns_wide_and_readable_in_print():
    """What is drawn of small tables: widths, and no text below 6 points."""
    similarity = pd.DataFrame(
        {"data": "glyphs", "seed": 0, "layer": "l", "cosine": [0.1, 0.2], "matched": 0.3, "chance": 0.2}
    )
    summary = overlap_table().assign(data="glyphs", low=0.1, high=0.3).query("expert == 0 and other == 1")
    figures.set_style()
    drawn = [
        figures.spectra_by_data(spectra_table()),
        figures.expert_spectra(spectra_table(seeds=[0]).query("data == 'glyphs'"), rank=2),
        figures.energy_by_expert(spectra_table(seeds=[0]).query("data == 'glyphs'"), rank=2),
        figures.overlap_heatmap(overlap_table()),
        figures.overlap_curves(summary),
        figures.expert_similarity(similarity),
        figures.retention_by_model(retention_rows().query("budget == 100")),
        figures.retention_curves(retention_rows(), "budget", "KD steps"),
        figures.perplexity_by_tokens(published_rows(), {0: "none", 10: "5k"}),
        figures.perplexity_by_time(published_rows()),
        figures.frontier(*frontier_tables(), {0: "none", 10: "1%"}),
    ]
    for fig in drawn:
        assert fig.get_size_inches()[0] in (figures.ONE_COLUMN, figures.TWO_COLUMNS)
        fig.draw_without_rendering()
        sizes = [text.get_fontsize() for text in fig.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
        assert min(sizes) >= 6


def test_a_gathering_that_somebody_added_is_in_the_figures(monkeypatch):
    monkeypatch.setitem(gathering._METHODS, "geometric_median", lambda bank: bank.expert(0))
    retention = retention_rows()
    added = retention[retention["model"] == "topk"].assign(model="geometric_median")
    fig = figures.retention_curves(pd.concat([retention, added]), "budget", "KD steps")
    assert "geometric median" in {text.get_text() for legend in fig.legends for text in legend.get_texts()}
    fig = figures.retention_by_model(pd.concat([retention, added]).query("budget == 100"))
    assert "geometric median" in [tick.get_text() for tick in fig.axes[0].get_yticklabels()]


def test_scores_for_reading():
    """Mean ± SD, of one seed the score alone; models as in the figures, stages as in the work."""
    rows = [("svd", "distilled", 1.0), ("svd", "gathered", 4.0), ("svd", "distilled", 2.0), ("moe", "trained", 8.0)]
    table = pd.DataFrame(rows, columns=["model", "stage", "value"])
    shown = figures.scores_text(table, ["model"], ["stage"])
    assert list(shown.columns) == ["trained", "gathered", "distilled"]
    assert list(shown.index) == ["MoE (teacher)", "SVD-KG"]
    assert shown.loc["SVD-KG"].tolist() == ["", "4.0", "1.5 ± 0.7"]
    two = figures.scores_text(table.assign(data="glyphs"), ["model", "stage"], ["data"], digits=2)
    assert list(two.index) == [("MoE (teacher)", "trained"), ("SVD-KG", "gathered"), ("SVD-KG", "distilled")]
