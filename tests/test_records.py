"""Records and files: what two records differ in, one worker at a time, kills, a full disk, deterministic algorithms."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import kills
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout
from test_bad_input import flip, make_record
from test_processes import tiny_study

from ones_lib.data.files import checksum, remove_unfinished, save_tensors, write_text
from ones_lib.study import command, listing
from ones_lib.study import records as records_module
from ones_lib.study.listing import best, find_record, overview
from ones_lib.study.naming import describe, record_name
from ones_lib.study.parameters import read_parameters
from ones_lib.study.records import Record, Records, code_state, compare, config_hash, provenance
from ones_lib.study.running import Workplace, carry_out
from ones_lib.study.study import make_study

ROOT = Path(__file__).parents[1]


def edit(record: Record, name: str, **changes) -> None:
    path = record.folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- comparing -------------------------------------------------------------------------------------------------------


def test_two_records_of_the_same_differ_in_nothing(tmp_path, capsys):
    pair = [make_record(tmp_path / name) for name in ("a", "b")]
    assert compare(*pair).empty
    assert listing.main([str(record.folder) for record in pair]) == 0
    assert capsys.readouterr().out == "no difference except in times\n"


def test_every_difference_is_said(tmp_path, capsys):
    one, other = make_record(tmp_path / "a"), make_record(tmp_path / "b", seed=7)
    save_tensors(other.folder / "weights.safetensors", {"weight": torch.full((2, 2), 1.25), "more": torch.zeros(1)})
    (other.folder / "history.csv").write_text("step,loss,seconds\n1,2.0,9\n2,1.5,9\n")
    sums = {name: checksum(other.folder / name) for name in ("weights.safetensors", "predictions.safetensors")}
    edit(
        other, "result.json", sha256=sums, metrics={"accuracy": 0.5}, device="abacus", finished="later", wall_seconds=9
    )
    table = compare(Record(one.folder), Record(other.folder)).set_index(["part", "what"])
    assert set(table.index) == {
        ("config", "seed"),
        ("result", "metrics.accuracy"),
        ("result", "device"),
        ("history", "loss at step 2"),
        ("weights", "bias"),
        ("weights", "more"),
        ("weights", "weight"),
    }
    assert table.loc[("config", "seed")].tolist() == [0, 7]
    assert table.loc[("history", "loss at step 2")].tolist() == [1.0, 1.5]
    assert table.loc[("weights", "weight"), "record"] == "differs by up to 0.25"
    assert table.loc[("weights", "more")].tolist() == ["(none)", "shape [1]"]
    assert listing.main(["compare", str(one.folder), str(other.folder)]) == 1
    assert "loss at step 2" in capsys.readouterr().out
    assert listing.main([str(one.folder), str(tmp_path / "none")]) == 2
    assert "config.json: expected a record's config.json, found none" in capsys.readouterr().err


def test_a_record_says_which_code_it_is_of(monkeypatch, tmp_path):
    """The commit that git names, and whether files differ from it; nothing of the kind outside of a repository."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    monkeypatch.setattr(records_module, "__file__", str(tmp_path / "records.py"))
    assert code_state.__wrapped__() == "unknown"
    (tmp_path / "records.py").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert code_state.__wrapped__() == commit
    (tmp_path / "records.py").write_text("2")
    assert code_state.__wrapped__() == f"{commit}-dirty"
    assert {"versions", "device", "threads", "system", "code"} == set(provenance())


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_says_what_a_record_is():
    image = {"domain": "image", "seed": 0, "data": {"name": "glyphs"}}
    moe = {"kind": "moe", **image, "model": {"name": "widenet", "num_experts": 8}, "training": {"steps": 9}}
    student = {"kind": "student", **image, "method": "average", "teacher": moe, "training": None}
    taught = student | {"training": {"steps": 6}, "distillation": {}}
    assert record_name(student, "2dd3") == "student-glyphs-average-s0-2dd3"
    assert record_name(moe, "2dd3") == "moe-glyphs-s0-2dd3"
    about = {"data": "glyphs", "task": None, "model": "widenet, 8 experts", "seed": 0}
    assert describe(moe) == {"kind": "moe", **about, "method": None, "steps": 9}
    assert describe(student) == {"kind": "student", **about, "method": "average", "steps": 0}
    assert describe(taught)["steps"] == 6

    text = {
        "domain": "text",
        "seed": 1,
        "data": {"name": "tasks", "of_tasks": {"name": "local", "text_dir": "/my/own texts"}},
    }
    dense = {"kind": "dense", **text, "model": {"num_experts": 1}, "training": {"steps": 9}}
    tuned = {"kind": "finetuned", **text, "task": "sst2", "start": dense, "training": {"steps": 1}}
    assert record_name(tuned, "a") == "finetuned-own_texts-sst2-dense-s1-a"
    of_tuned = {"kind": "student", **text, "method": "fit", "teacher": tuned, "training": None}
    assert record_name(of_tuned, "a") == "student-own_texts-sst2-fit-s1-a"
    distilled = {**tuned, "start": {**of_tuned, "teacher": dense, "training": {"steps": 4}}, "distillation": {}}
    assert (describe(distilled)["steps"], describe(distilled)["method"]) == (4, "fit")

    language = {"domain": "language", "seed": 0, "data": {"name": "/texts/a.jsonl"}, "training": None}
    published = {"kind": "moe", **language, "model": {"checkpoint": "owner/An MoE"}}
    assert record_name(published, "a") == "moe-a.jsonl-An_MoE-s0-a"
    assert record_name({"kind": "speed", "what": [1], "device": "abacus"}, "a") == "speed-a"


def test_a_record_is_found_by_its_hash_whatever_else_its_name_says(tmp_path):
    """Those of before had no words in their names; unfinished work of before is gone on with."""
    records, config = Records(tmp_path / "records"), {"kind": "moe", "seed": 0, "training": None}
    key = f"moe-{config_hash(config)}"
    assert records.find(config) is None
    assert records.partial(config).name == f"{key}.partial"
    record = make_record(tmp_path)
    assert record.folder.name == f"moe-s0-{config_hash(config)}"
    for name in (key, f"moe-my-best-one-{config_hash(config)}"):
        record.folder.rename(tmp_path / "records" / name)
        record = records.find(config)
        assert record.folder.name == name
        assert records.folder(config) == record.folder
        assert records.find(config | {"seed": 1}) is None
        assert [found.folder for found in records.all("moe")] == [record.folder]
    redo = Records(tmp_path / "records", "2999-01-01T00:00:00+00:00")
    assert redo.find(config) is None
    made = redo.finish(config, {}, pd.DataFrame(), {}, {})  # in its place
    assert made.folder == record.folder
    assert [path.name for path in (tmp_path / "records").iterdir()] == [record.folder.name]


def test_the_demos_records_are_those_of_its_figures():
    """A change of its configs would train all of it again."""
    study = make_study("image", read_parameters("demo", {}, ["image"]))
    named = json.loads((ROOT / "figures" / "imagenet_learning_curves.json").read_text())["records"]
    ours = [config_hash(make(seed)) for make in (study.moe, study.dense) for seed in study.seeds]
    assert sorted(name.rpartition("-")[2] for name in named) == sorted(ours)


# --- listing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two folders of records of a project: moe, student of 0 and of 3 steps in one, another student in the other; a table."""
    study = tiny_study(tmp_path)
    study.records = Records(tmp_path / "runs" / "records")
    configs = [study.student("average", 0, 0), study.student("average", 0), study.dense(0)]
    study.run(configs)
    study.records = Records(tmp_path / "runs" / "smoke" / "records")
    study.run([study.student("topk", 0, 0)])
    shutil.rmtree(study.records.find(study.moe(0)).folder)
    study.records.table({"kind": "speed"}, lambda: pd.DataFrame({"ms": [1.0]}))
    (tmp_path / "run_all.sh").touch()
    monkeypatch.chdir(tmp_path)
    return study


def test_records_of_all_folders_are_listed(project, capsys):
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = "record kind data model method seed steps metric score finished folder"
    assert lines[0].split() == columns.split()
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert len(rows) == len(lines) - 1 == 6
    kinds = sorted(row[1] for row in rows.values())
    assert kinds == ["dense", "moe", "speed", "student", "student", "student"]
    record = Records("runs/records").find(project.student("average", 0))
    name = f"student-glyphs-average-s0-{config_hash(record.config)[:6]}"
    score = f"{100 * record.result['metrics']['accuracy']:.2f}"
    finished = record.result["finished"][:16].split("T")
    words = f"{name} student glyphs widenet_tiny_patch16_224, 4 experts average 0 3 accuracy {score}"
    assert rows[name] == [*words.split(), *finished, "runs/records"]
    assert find_record(name, listing.record_roots()).folder.samefile(record.folder)


def test_a_listing_of_some(project, capsys):
    def listed(*arguments):
        assert listing.main([*arguments]) == 0
        return [line.split()[0].rpartition("-")[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert listed("--kind", "student", "--method", "topk") == ["student-glyphs-topk-s0"]
    assert listed("list", "--records", "runs/records", "--data", "glyphs", "--kind", "moe") == ["moe-glyphs-s0"]
    assert sorted(listed("--best")) in (
        [["dense-glyphs-s0", "moe-glyphs-s0", f"student-glyphs-{method}-s0"] for method in ("average", "topk")]
    )
    errors = {
        ("--kind", "sudent"): "--kind: expected one of dense, moe, speed, student, found 'sudent'",
        ("--records", "nowhere"): "--records: expected a folder, found none: nowhere",
        ("compare", "moe", "student"): "found 'student' of 3: student-glyphs-",
    }
    for arguments, message in errors.items():
        assert listing.main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    damaged = Records("runs/records").find(project.dense(0)).folder / "result.json"
    damaged.write_text("{")
    assert listing.main(["--kind", "moe"]) == 0
    assert "result.json: expected JSON" in capsys.readouterr().err


def test_the_best_record_has_the_highest_accuracy_or_the_lowest_loss(tmp_path):
    records = Records(tmp_path)
    of_losses = [{"loss": 2.0, "accuracy": 0.3}, {"loss": 1.0, "accuracy": 0.0}]
    for seed, metrics in enumerate([{"accuracy": 0.5}, {"accuracy": 0.75}, *of_losses]):
        config = {"kind": "dense", "seed": seed, "data": {"name": "loss" if "loss" in metrics else "other"}}
        records.finish(config, {}, pd.DataFrame(), {}, {"metrics": metrics})
    table, errors = overview(records.all("*"))
    assert errors == []
    kept = best(table).set_index("data")
    assert kept["seed"].to_dict() == {"other": 1, "loss": 3}
    assert kept["score"].to_dict() == {"other": 75.0, "loss": 1.0}


def test_without_records_the_listing_says_where_they_would_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listing, "project_root", lambda: tmp_path)
    assert listing.main([]) == 2
    assert "expected records in runs/records or runs/*/records" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        listing.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ones_lib {version('ones-lib')}\n"


# --- one at a time ---------------------------------------------------------------------------------------------------


def test_work_on_a_record_waits_for_the_one_who_is_at_it(tmp_path, capsys):
    records, config, order = Records(tmp_path), {"kind": "moe", "seed": 0}, []

    def second():
        with Records(tmp_path).lock(config):
            order.append("second")

    with records.lock(config):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        order.append("first")
    waiting.join(timeout=10)
    assert order == ["first", "second"]
    assert f"moe-s0-{config_hash(config)}: another run works on it, waiting" in capsys.readouterr().err
    with records.lock({"kind": "moe", "seed": 1}), records.lock(config):  # other records are others
        pass


def test_a_killed_process_holds_no_lock(tmp_path):
    records, config = Records(tmp_path), {"kind": "moe"}
    with records.lock(config):
        (file,) = (tmp_path / "locks").iterdir()
    code = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", code, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(Timeout):
            FileLock(file).acquire(timeout=0)
        holder.kill()
    with records.lock(config):
        pass


def test_two_studies_at_once_make_each_record_once(tmp_path):
    """Both in threads of their own here, on the same records; each is trained by one of them alone."""
    studies = [tiny_study(tmp_path) for _ in range(2)]
    configs = [studies[0].moe(0), studies[0].student("average", 0)]
    found, threads = {}, []
    studies[0].open_data()
    for number, study in enumerate(studies):
        threads.append(threading.Thread(target=lambda n=number, s=study: found.update({n: s.run(configs)})))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [r.folder for r in found[0]] == [r.folder for r in found[1]]
    for record in found[0]:
        assert not compare(record, record).size
        assert sorted(p.name for p in record.folder.iterdir()) == [
            *("config.json", "history.csv", "predictions.safetensors", "result.json", "weights.safetensors")
        ]
    alone = tiny_study(tmp_path / "alone").run(configs)
    for ours, theirs in zip(found[0], alone, strict=True):
        assert compare(ours, theirs).empty


# --- kills and full disks --------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_run_that_is_killed_and_started_again_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """The notebook of one student, killed while it trains; ``tests/kills.py`` does the same with all of them."""
    # As here and in workers: the last digits depend on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--to", "smoke"]  # as a sweep's cell, whose values have been checked
    arguments += ["--profile", "smoke", "--only", "student", "-p", "teacher_steps", "20", "-p", "processes", "2"]
    folder = kills.project(tmp_path / "killed")
    run, started = kills.start(folder, arguments), time.monotonic()
    while not list(folder.glob("runs/*/records/*.partial")):
        assert run.poll() is None, (folder / "log.txt").read_text()[-2000:]
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    kills.kill(run, random.Random(1))  # all of its processes
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(kills.ROOT))
    assert command.main([*arguments[:-1], "1"]) == 0
    assert "left" not in kills.contents(folder / "runs").values()
    (root,) = folder.rglob("records")
    made = [Record(path.parent) for path in root.glob("*/result.json")]
    assert sorted(record.config["kind"] for record in made) == ["dense", "moe", "student"]
    place = Workplace(Records(tmp_path / "alone"), tmp_path / "cache", tmp_path / "logits")
    for record in sorted(made, key=lambda record: record.config["kind"]):  # the teacher before the student
        assert set(compare(record, carry_out(record.config, place))["what"]) <= {"threads", "code"}


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    gone = 2**22 + 1  # no process has such a number
    names = [f"a.txt.{os.uname().nodename}-{gone}.tmp", f"a.txt.elsewhere-{gone}.tmp"]
    names.append(f"a.txt.{os.uname().nodename}-{os.getppid()}.tmp")
    for name in names:
        (tmp_path / name).touch()
    write_text(tmp_path / "a.txt", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", *names[1:]}  # of another host, or at work, for all we know
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_no_room_is_told_and_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands for a full disk; what was there stays."""
    resource = pytest.importorskip("resource")
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    before, errors = checksum(tmp_path / "a.safetensors"), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        for write, name, content in (
            (save_tensors, "a.safetensors", {"a": torch.ones(4000)}),
            (write_text, "b.txt", "b" * 4000),
        ):
            try:
                write(tmp_path / name, content)
            except OSError as error:
                errors.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for error, name in zip(errors, ("a.safetensors", "b.txt"), strict=True):
        assert "could not be written, with" in error
        assert str(tmp_path / name) in error
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert checksum(tmp_path / "a.safetensors") == before


# --- the same again --------------------------------------------------------------------------------------------------


def test_deterministic_algorithms_give_the_same_and_are_noted(tmp_path):
    plain, strict = tiny_study(tmp_path / "a"), tiny_study(tmp_path / "b", deterministic=True)
    try:
        pairs = [study.run([study.moe(0), study.student("fit", 0)]) for study in (plain, strict)]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(*pairs, strict=True):
        table = compare(ours, theirs)
        assert table["what"].tolist() == ["execution.deterministic"]
        assert table["other"].tolist() == [True]


def test_a_changed_teacher_is_not_learnt_from(tmp_path):
    """Before any step of the student's."""
    study = tiny_study(tmp_path)
    (teacher,) = study.run([study.moe(0)])
    flip(teacher.folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected the file as it was written"):
        study.run([study.student("average", 0)])
    shutil.rmtree(teacher.folder)
    assert len(study.run([study.student("average", 0)])) == 1


# --- nothing that runs what it reads ---------------------------------------------------------------------------------


def test_nothing_is_unpickled_and_no_code_is_fetched():
    """Weights are safetensors, YAML is read as plain values, models bring no code."""
    forbidden = (
        "pickle",
        "torch.load(",
        "yaml.load(",
        "trust_remote_code=True",
        "allow_pickle=True",
        "joblib.load",
        " eval(",
    )
    for path in (ROOT / "ones_lib").rglob("*.py"):
        text = path.read_text()
        for word in forbidden:
            assert word not in text, (path, word)
        for call in ("AutoConfig.from_pretrained(", "AutoTokenizer.from_pretrained("):
            for rest in text.split(call)[1:]:
                assert "trust_remote_code=False" in rest.partition(")")[0], (path, rest[:60])
