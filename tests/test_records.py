"""Records and files: what two records differ in, one worker at a time, kills, a full disk, deterministic algorithms."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import kills
import pytest
import torch
from filelock import FileLock, Timeout
from test_bad_input import flip, make_record
from test_processes import tiny_study

from ones_lib.data.files import checksum, remove_unfinished, save_tensors, write_text
from ones_lib.study import command
from ones_lib.study import records as records_module
from ones_lib.study.records import Record, Records, code_state, compare, config_hash, provenance
from ones_lib.study.running import Workplace, carry_out

ROOT = Path(__file__).parents[1]


def edit(record: Record, name: str, **changes) -> None:
    path = record.folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- comparing -------------------------------------------------------------------------------------------------------


def test_two_records_of_the_same_differ_in_nothing(tmp_path, capsys):
    pair = [make_record(tmp_path / name) for name in ("a", "b")]
    assert compare(*pair).empty
    assert records_module.main([str(record.folder) for record in pair]) == 0
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
    assert records_module.main([str(one.folder), str(other.folder)]) == 1
    assert "loss at step 2" in capsys.readouterr().out
    assert records_module.main([str(one.folder), str(tmp_path / "none")]) == 2
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
    assert f"moe-{config_hash(config)}: another run works on it, waiting" in capsys.readouterr().err
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
