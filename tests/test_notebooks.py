"""The notebooks through papermill at the smoke profile and in a browser, and what the batch refuses."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from ones_lib.study import command, notebooks, progress
from ones_lib.study.command import parse_value
from ones_lib.study.parameters import GROUPS, ParameterError, group_of, read_parameters

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def project(tmp_path_factory, text_cache):
    """A copy of the notebooks to run in, so that the tests leave the project as it is."""
    root = tmp_path_factory.mktemp("project")
    (root / "runs").mkdir()
    (root / "runs" / "cache").symlink_to(text_cache)
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copy(ROOT / "run_all.sh", root)
    before, path = Path.cwd(), os.environ.get("PYTHONPATH")
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(ROOT)
    yield root
    os.chdir(before)
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def records_made(root):
    return {p: p.stat().st_mtime_ns for p in (root / "runs" / "smoke" / "records").rglob("weights.safetensors")}


def assert_reads_like_a_paper(executed):
    """No outputs of bars, which live while work lasts, of standard error, or of bare objects; trainings are one line."""
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    texts = [o["text"] for o in outputs if o["output_type"] == "stream"]
    assert [o for o in outputs if o.get("name") == "stderr" or "%|" in str(o.get("text", o.get("data")))] == []
    assert [o["data"] for o in outputs if set(o.get("data", ())) == {"text/plain"}] == []  # no repr of an object
    if executed.name != "05_inference_speed.ipynb":
        assert any(re.search(r": \d+ models found(, \d+ made in .*\d s)?\n", text) for text in texts)


def test_smoke_run_makes_figures_and_is_not_done_twice(project, capfd):
    assert command.main(["--profile", "smoke"]) == 0
    out = capfd.readouterr()
    assert "[1/8] 01_imagenet.ipynb: done in" in out.out
    assert "teacher and dense baseline: 0 models found, 4 made in " in out.out
    assert "teacher_steps=40 and kd_steps=10 are 3.2 and 0.8 epochs" in out.out
    bars = [line for line in re.split(r"[\r\n]", out.err) if line.strip()]
    assert any("pre-training, distillation, fine-tuning:" in bar for bar in bars)  # from inside the notebook
    assert [line for line in bars if not re.search(r" \[\d\d:\d\d[<,]", line)] == []  # no library has anything to say
    shown = list((project / "runs" / "smoke").glob("*.ipynb"))
    assert len(shown) == 8
    for executed in shown:
        assert_reads_like_a_paper(executed)
    folder = project / "runs" / "smoke" / "figures"
    results = pd.read_csv(folder / "imagenet_results.csv")
    assert list(results.columns) == ["data", "model", "stage", "seed", "accuracy", "retention"]
    assert set(results["model"]) == {
        *("moe", "dense", "dense_long", "dense_kd"),
        *("zero_ffn", "one_expert", "average", "svd"),
    }
    assert set(results["stage"]) == {"trained", "gathered", "distilled"}
    for name in (
        "imagenet_learning_curves",
        "imagenet_accuracy",
        "imagenet_retention",
        "imagenet_active_width",
        "retention_budget",
        "retention_experts",
        "retention_benefit",
        "nlp_learning_curves",
        "nlp_scores",
        "nlp_retention",
        "nlp_retention_tasks",
        "nlp_budget_masked_lm",
        "nlp_budget_tasks",
        "nlp_active_width",
        "expert_spectra",
        "expert_overlap",
        "expert_overlap_pairs",
        "expert_similarity",
        "gathering_distance",
        "gathering_output_error",
        "gathering_ablation",
        "gathering_budgets",
        "gathering_times",
        "gathering_errors",
        "other_teachers",
        "other_distillations",
        "inference_speed",
        "dispatch_speed",
        "language_router",
        "language_frontier",
        "language_perplexity_active",
        "language_perplexity_2x",
        "language_times",
    ):
        for ending in ("png", "pdf", "csv", "json"):
            assert (folder / f"{name}.{ending}").stat().st_size > 0, (name, ending)
    ablation = pd.read_csv(folder / "gathering_ablation.csv")
    assert list(ablation.columns) == [
        *(
            "data",
            "method",
            "scale",
            "rank",
            "budget",
            "seed",
            "accuracy",
            "retention",
            "layer_error",
            "loss",
            "seconds",
        )
    ]
    # Four plain ones, whitened SVD-KG, SVD-KG at another scale, both at another rank; images and text, of which the variants
    # are not distilled.
    counts = ablation.groupby(["data", "budget"]).size()
    assert counts.to_dict() == {("glyphs", 0): 16, ("glyphs", 5): 16, ("names", 0): 8, ("names", 3): 4}
    assert ablation[["accuracy", "layer_error"]].notna().all(axis=None)
    teachers = pd.read_csv(folder / "other_teachers.csv")
    assert set(teachers["teacher"]) == {"top-k MoE", "upcycled", "Soft MoE"}
    assert {2, 4} == set(pd.read_csv(folder / "retention_experts.csv")["num_experts"].dropna())
    language = pd.read_csv(folder / "language_results.csv")
    dense = {"dense", "dense_long", "dense_width", "dense_width_long"}
    assert set(language["model"]) == {"moe", *dense, "do_acp", "reconstruction"}
    assert set(language["teacher"]) == {"Mixtral", "GLM-4-MoE"}
    assert set(language["budget"].dropna()) == {0, 2, 4}
    assert (language.loc[language["model"] == "moe", "ratio"] == 1).all()
    assert (language.loc[language["budget"].notna(), "seconds"] > 0).all()
    steps = pd.read_csv(folder / "language_steps.csv")
    assert set(steps["model"]) == {"read-out", "regression, teacher's inputs", "regression, own inputs"}
    text = pd.read_csv(folder / "nlp_results.csv")
    assert list(text.columns) == ["data", "task", "model", "stage", "seed", "metric", "value", "retention"]
    assert set(text["task"]) == {"masked_lm", "family", "answer_or_none", "average"}
    for _, part in text.groupby("task"):
        assert set(part["model"]) == set(results["model"])
        assert set(part["seed"]) == {0}

    # Again: nothing to do. Asked for the figures: drawn from the records, byte for byte, without training.
    records, tables = records_made(project), {p: p.read_bytes() for p in folder.glob("*.csv")}
    assert command.main(["--profile", "smoke"]) == 0
    assert capfd.readouterr().out.count("finished before") == 8
    some = ["--profile", "smoke", "--only", "07"]  # images and text
    (folder / "gathering_ablation.csv").unlink()
    assert command.main([*some, "--figures"]) == 0
    assert "finished before" not in capfd.readouterr().out
    assert records_made(project) == records
    assert {p: p.read_bytes() for p in folder.glob("*.csv")} == tables
    assert command.main(some) == 0  # a notebook whose figures were drawn again is still finished
    assert capfd.readouterr().out.count("finished before") == 1


def test_figures_alone_train_nothing(project, capfd):
    few = ["--profile", "smoke", "--only", "01", "-p", "seeds", "[9]", "-p", "figures_dir", "runs/other"]
    before = records_made(project)
    assert command.main([*few, "--figures"]) == 1
    error = capfd.readouterr().err
    assert "ValueError: records: expected all 2 in" in error
    assert "found 0; the first missing one: moe, seed 9" in error
    assert records_made(project) == before


def test_an_interrupt_reaches_a_notebook_that_trains(project, monkeypatch, capsys):
    """Only the main thread gets it: a notebook that trains must be executed there."""

    def interrupted(*_):
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "execute", interrupted)
    assert command.main(["--profile", "smoke", "--only", "01", "-p", "seeds", "[11]"]) == 130
    assert "interrupted; run it again to go on where it stopped" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_leaves_the_notebook_as_interrupted(project):
    """SIGINT to the whole process group, as a terminal sends it, while a notebook trains."""
    long = ["--profile", "smoke", "--only", "01", "-p", "seeds", "[13]", "-p", "teacher_steps", "100000"]
    command_line = [sys.executable, "-m", "ones_lib.study", *long]
    with (project / "interrupted.log").open("w+") as log:
        run = subprocess.Popen(command_line, cwd=project, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while " [00:" not in Path(log.name).read_text():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=60) == 130
    *before, last = Path(log.name).read_text().splitlines()
    assert last == "run_all.sh: interrupted; run it again to go on where it stopped"
    assert not any("Traceback" in line or "Error" in line or "died" in line for line in before)
    assert (project / "runs" / "smoke" / "01_imagenet.interrupted.ipynb").exists()
    assert not (project / "runs" / "smoke" / "01_imagenet.failed.ipynb").exists()


def test_force_trains_again(project):
    few = [
        "--profile",
        "smoke",
        "--only",
        "student",
        "-p",
        "seed",
        "7",
        "-p",
        "teacher_steps",
        "5",
        "-p",
        "processes",
        "1",
    ]
    assert command.main(few) == 0
    before = records_made(project)
    assert command.main([*few, "--force"]) == 0
    changed = {path for path, stamp in records_made(project).items() if before.get(path) != stamp}
    assert len(changed) == 3  # teacher, dense, the student
    assert set(before) == set(records_made(project))


def test_a_failing_notebook_ends_the_batch_naming_cell_and_error(project, capfd):
    few = ["--profile", "smoke", "--only", "01", "02", "-p", "processes", "1", "-p", "learning_rate", "1e30"]
    assert command.main(few) == 1
    error = capfd.readouterr().err
    assert "01_imagenet.ipynb failed in cell" in error
    assert "Diverged: the loss became nan at step" in error
    assert (project / "runs" / "smoke" / "01_imagenet.failed.ipynb").exists()


def test_a_bad_value_is_refused_before_the_first_notebook_runs(project, capfd):
    """Also where it belongs to the last notebook alone."""
    assert command.main(["--profile", "smoke", "--only", "01", "08", "-p", "teacher_methods", "[sun]"]) == 1
    said = capfd.readouterr()
    assert "-p: teacher_methods: found 'sun'; did you mean 'sum'?" in said.err
    assert "profile smoke" not in said.out


@pytest.fixture
def page():
    """A page of a headless Chromium, and what its console says of errors."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser_path = next((found for name in names if (found := shutil.which(name))), None)
    if browser_path is None:
        pytest.skip(f"needs a browser, found none of {', '.join(names)}: on Debian, apt-get install chromium")
    switches = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    switches += ["disable-background-networking", "disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=[f"--{s}" for s in switches])
        opened, errors = browser.new_page(), []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield opened, errors
        browser.close()


@pytest.fixture
def voila(project):
    """The address at which Voila serves the executed notebook of the experts."""
    assert command.main(["--profile", "smoke", "--only", "04"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook = project / "runs" / "smoke" / "04_expert_spectra.ipynb"
    arguments = ["voila", str(notebook), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with (project / "voila.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log, cwd=project)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_widgets_in_a_browser(page, voila):
    """The arrow keys move the rank slider: numbers and pictures change, by choice of the method too, and nothing fails."""
    page, errors = page
    page.goto(voila, timeout=80_000, wait_until="commit")
    page.wait_for_selector(".ones-numbers", timeout=80_000)
    page.wait_for_selector("[data-state=ready]")
    shown = "() => [document.querySelector('.ones-numbers').innerText, ...[...document.images].map(i => i.src)]"

    def after(action):
        """What is shown before and after an action that changes the numbers."""
        before = page.evaluate(shown)
        action()
        page.wait_for_function(f"before => ({shown})()[0] !== before", arg=before[0], timeout=10_000)
        page.wait_for_selector("[data-state=ready]")
        return before, page.evaluate(shown)

    page.locator(".noUi-handle").first.focus()  # the rank's; the width's comes after it
    before, moved = after(lambda: page.keyboard.press("ArrowRight"))
    rank = [int(re.search(r"energy kept at rank (\d+)", text)[1]) for text, *_ in (before, moved)]
    assert rank[1] == rank[0] + 1
    assert sum(one != two for one, two in zip(before[1:], moved[1:], strict=True)) == 4  # the linked views
    _, averaged = after(lambda: page.get_by_label("gathering").select_option("averaging"))
    assert "averaging: output error" in averaged[0]
    # Voila asks a server elsewhere for two style sheets of icons, and is not answered here.
    assert [e for e in errors if "Failed to load resource: net::ERR_" not in e] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-p", "teacher_step", "5"],
            "no chosen notebook has a parameter 'teacher_step'; did you mean 'teacher_steps'?",
        ),
        (["-p", "num_experts", "eight"], "-p: num_experts: expected int, found 'eight'"),
        (["-p", "seeds", "3"], "seeds: expected list[int], found 3"),
        (["-p", "renormalize", "1"], "renormalize: expected bool, found 1"),
        (["--only", "77"], "--only: no notebook '77', expected of ['01_imagenet'"),
        (["--only", "01", "-p", "budgets", "[5]"], "no chosen notebook has a parameter 'budgets'"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(project, capsys, arguments, message):
    assert command.main(["--profile", "smoke", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_values_of_the_command_line():
    assert parse_value("8e-3") == 0.008
    assert [parse_value(t) for t in ("3", "[0, 1]", "null", "true", "glyphs", "")] == [
        3,
        [0, 1],
        None,
        True,
        "glyphs",
        "",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebooks_are_committed_without_outputs_and_are_short_cells(notebook):
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            if "parameters" not in cell.metadata.get("tags", []):
                assert len(cell.source.splitlines()) <= 15


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_declares_its_groups_and_reads_nothing_else(notebook):
    """Its parameters cell has three lines; every ``p.name`` in it is a parameter of the groups that it declares."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    (given,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(given.splitlines()) == 3
    assert 'profile = "demo"' in given
    groups = notebooks.groups_of(notebook)
    used = set(re.findall(r"(?<![\w.])p\.(\w+)", "\n".join(cell.source for cell in cells)))
    assert {group_of()[name] for name in used} <= set(groups)
    assert not any("globals()" in cell.source for cell in cells)


def test_papermill_alone_runs_a_notebook_with_overrides(project, tmp_path):
    """Without run_all.sh, from any folder, as JupyterLab does. The library's folder says where the project is."""
    (project / "ones_lib").symlink_to(ROOT / "ones_lib")
    overrides = "{overrides: {num_experts: 2, seed: 3, teacher_steps: 3, budget: 0, processes: 1}}"
    arguments = ["-k", "python3", str(project / "notebooks" / "student.ipynb"), "out.ipynb", "-p", "profile", "smoke"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *arguments, "-y", overrides],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_reads_like_a_paper(tmp_path / "out.ipynb")
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = [str(o.get("data", {}).get("text/html", "")) for cell in executed.cells for o in cell.get("outputs", [])]
    assert any("num_experts = 2" in text and "experts of the MoE" in text for text in shown)  # what it ran with
    assert any("figures to runs/smoke/figures" in text for text in shown)
    row = pd.read_csv(project / "runs" / "smoke" / "figures" / "student.csv").iloc[0]
    assert (row["num_experts"], row["seed"], row["budget"]) == (2, 3, 0)


def test_a_warning_of_ours_is_text_and_others_are_not(capsys, monkeypatch):
    said = []
    monkeypatch.setattr(warnings, "showwarning", partial(progress._show_warning, lambda *about: said.append(about)))
    for module in ("ones_lib.views.speed", "another"):
        warn = {"__name__": module, "warnings": warnings}
        exec(f"def warn(): warnings.warn('{module}: too few tokens', stacklevel=2)", warn)
        warn["warn"]()
    assert capsys.readouterr().out == "warning: ones_lib.views.speed: too few tokens\n"
    assert len(said) == 1


@pytest.mark.parametrize("soon", [0, 60])
def test_a_bar_in_a_notebook_leaves_an_output_without_data_or_none(monkeypatch, soon):
    shown = []
    handle = SimpleNamespace(update=lambda data, **_: shown.append(data))
    monkeypatch.setattr(progress, "SOON", soon)
    monkeypatch.setattr(progress.logging, "is_progress_bar_enabled", lambda: True)  # another test may have put them off
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data) or handle)
    bar = progress._bar(None, [range(3)], {"desc": "steps", "mininterval": 0})
    for step in bar:
        bar.set_postfix_str(f"loss {step}")
    assert bool(shown) == (not soon)
    assert not shown or ("loss 2" in shown[-2]["text/plain"] and shown[-1] == {})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")]
)
def test_durations_for_people(seconds, text):
    assert progress.duration(seconds) == text


# --- parameters --------------------------------------------------------------------------------------------------------

PROFILES = sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_have_a_value_for_every_parameter(profile):
    parameters = read_parameters(profile, {}, GROUPS)
    assert set(parameters.values()) == set(group_of())


@pytest.mark.parametrize("profile", PROFILES)
def test_help_names_every_profile_as_its_first_line_does(profile):
    first = (ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    said = subprocess.run([ROOT / "run_all.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^  {profile} +{re.escape(first.removeprefix('# ').rstrip('.:'))}$", said, re.MULTILINE)


def test_every_name_is_of_one_group_and_has_a_meaning():
    names = [declared for group in GROUPS.values() for declared in dataclasses.fields(group)]
    assert len({declared.name for declared in names}) == len(names)
    assert all(declared.metadata["meaning"] for declared in names)


def test_overrides_win_over_the_profile_and_the_profile_over_its_base():
    assert read_parameters("demo", {}, ["image"]).num_experts == 8
    smoke = read_parameters("smoke", {"num_experts": 16}, ["image"])
    assert (smoke.num_experts, smoke.d_model, smoke.learning_rate) == (16, 16, 0.008)
    with pytest.raises(AttributeError, match="text_d_ff: no parameter of the groups"):
        smoke.text_d_ff  # noqa: B018


@pytest.mark.parametrize(
    ("profile", "overrides", "folder"),
    [
        ("demo", {}, "figures"),
        ("demo", {"processes": 1, "allow_training": False, "redo_before": "", "records_dir": "mine"}, "figures"),
        ("demo", {"num_experts": 8, "distortion": 1}, "figures"),  # the profile's own values
        ("demo", {"num_experts": 16}, "runs/demo/figures"),
        ("demo", {"num_experts": 16, "figures_dir": "mine"}, "mine"),
        ("real", {}, "figures/real"),
        ("real", {"data_dir": "mine"}, "runs/real/figures"),
    ],
)
def test_other_values_leave_the_profiles_figures_alone(profile, overrides, folder):
    assert read_parameters(profile, overrides, ["image"]).figures_dir == folder


def test_a_whole_number_passes_for_a_fraction_but_not_the_other_way():
    assert read_parameters("smoke", {"distortion": 1}, ["image"]).distortion == 1.0
    with pytest.raises(ParameterError, match="overrides: depth: expected int or null, found 2.5"):
        read_parameters("smoke", {"depth": 2.5}, ["image"])


def test_a_profile_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: smoke\nimage: {num_experts: 3}\n")
    mine = read_parameters(str(tmp_path / "mine.yaml"), {}, ["image"])
    assert (mine.profile, mine.num_experts, mine.d_model) == ("mine", 3, 16)
    assert mine.figures_dir == "runs/mine/figures"  # not its base's
    (tmp_path / "mine.yaml").write_text("base: demo\ncommon: {figures_dir: elsewhere}\n")
    assert read_parameters(str(tmp_path / "mine.yaml"), {}, ["image"]).figures_dir == "elsewhere"
    (tmp_path / "mine.yaml").write_text("image: {num_experts: 3}\n")
    with pytest.raises(ParameterError, match="mine.yaml: common: expected a value for 'methods', found none"):
        read_parameters(str(tmp_path / "mine.yaml"), {}, ["image"])
