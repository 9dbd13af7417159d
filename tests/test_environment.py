"""The two files that state the requirements, and run_all.sh's choice of an environment."""

import os
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import ones_lib
from ones_lib.study import command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]


def run_all(*arguments, cwd=ROOT, **env):
    return subprocess.run(
        [str(Path(cwd) / "run_all.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "ONES_LOCKED": "", **env},
        check=False,
    )


def test_environment_yml_states_the_same_as_pyproject():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [d["pip"] for d in dependencies if isinstance(d, dict)]
    assert sorted(map(str, map(Requirement, pip))) == sorted(map(str, map(Requirement, REQUIREMENTS)))
    (python,) = [d for d in dependencies if isinstance(d, str) and d.startswith("python")]
    assert Requirement(python).specifier == Requirement("python" + PROJECT["requires-python"]).specifier
    assert "pip" in dependencies


def test_the_users_packages_are_required():
    names = {Requirement(r).name for r in REQUIREMENTS}
    assert {"jupyterlab", "papermill", "torch", "timm", "matplotlib", "seaborn", "ipywidgets"} <= names


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_what_is_installed_satisfies_it(requirement):
    assert version(Requirement(requirement).name) in Requirement(requirement).specifier


def locked(name: str) -> list[Requirement]:
    """Entries of the lock file, one or more by platform, each with the hashes of its files."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line.split(" --hash=") for line in text.splitlines() if line and not line.startswith("#")]
    assert all(len(line) > 1 and all(h.strip().startswith("sha256:") for h in line[1:]) for line in lines)
    return [r for line in lines if (r := Requirement(line[0])).name == name]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_the_lock_file_satisfies_it(requirement):
    wanted = Requirement(requirement)
    found = locked(wanted.name.lower())
    assert found, wanted.name
    for entry in found:
        (pin,) = entry.specifier
        assert pin.operator == "=="
        assert pin.version in wanted.specifier


def test_help():
    result = run_all("--help")
    assert result.returncode == 0
    for option in ("--profile", "--only", "-p NAME VALUE", "--force", "test"):
        assert option in result.stdout


def test_version(capsys):
    assert run_all("--version").stdout == f"ones_lib {PROJECT['version']}\n"
    assert PROJECT["version"] == ones_lib.__version__
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out == f"ones_lib {PROJECT['version']}\n"


def test_active_environment_is_used_and_a_bad_request_fails():
    result = run_all("--only", "77", VIRTUAL_ENV=sys.prefix)
    assert f"using the active environment {sys.prefix}" in result.stderr
    assert "no notebook '77'" in result.stderr
    assert result.returncode == 1


def executable(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_conda_makes_its_environment_once(tmp_path):
    """With a stand-in for conda: conda itself was not run by this project's makers."""
    for name in ("run_all.sh", "pyproject.toml", "environment.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "run_all.sh").chmod(0o755)
    (tmp_path / "bin").mkdir()
    executable(
        tmp_path / "bin" / "conda",
        'echo "$@" >>conda.log; mkdir -p .conda/bin; printf "#!/bin/sh\\necho ran \\"\\$@\\"\\n" >.conda/bin/python;'
        " chmod +x .conda/bin/python\n",
    )
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, "exit 1\n")
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "ONES_PYTHON": ""}
    for _ in range(2):
        result = run_all("--profile", "smoke", cwd=tmp_path, **env)
        assert result.returncode == 0, result.stderr
        assert "using the conda environment .conda" in result.stderr
        assert result.stdout == "ran -m ones_lib.study --profile smoke\n"
    calls = (tmp_path / "conda.log").read_text().splitlines()
    assert calls == ["env create --quiet --yes --prefix .conda --file environment.yml"]


def test_without_python_and_conda_it_says_what_it_needs(tmp_path):
    for name in ("run_all.sh", "pyproject.toml", "environment.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "run_all.sh").chmod(0o755)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, "exit 1\n")
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "ONES_PYTHON": ""}
    result = run_all(cwd=tmp_path, **env)
    assert result.returncode == 1
    assert "expected Python 3.11 to 3.13 or conda, found neither" in result.stderr
