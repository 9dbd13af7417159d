#!/usr/bin/env bash
# The study in one command: finds or makes an environment, executes the notebooks, writes figures/.
# "./run_all.sh test" runs the tests instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [--profile NAME] [--only NN ...] [-p NAME VALUE]... [--force | --figures | --dry-run]
                    [--launch COMMAND [--shard]] [--device-batch N] [--deterministic]
       ./run_all.sh --sweep FILE [--jobs N] [--on local|slurm|ADDRESS]
       ./run_all.sh test [pytest's options]

Makes an environment if the active one lacks something, executes the notebooks with papermill, and writes
figures/. Finished work is found again and not done twice.

  --profile NAME     parameter file notebooks/profiles/NAME.yaml (demo), see below; or the path of a file of your own
  --only NN ...      only these notebooks, by number or name: --only 01 02
  -p NAME VALUE      set any parameter of the profile; may be repeated: -p num_experts 8 -p seeds '[0, 1]'
                     Figures of other values than the profile's go to runs/<profile>/figures; -p figures_dir: elsewhere
  --force            do finished work again, trainings included
  --figures          draw every figure again from the records, without training: under a minute
  --dry-run          make one step of each kind of training that the notebooks ask for, and say what all would cost
  --launch COMMAND   start the processes of each training with a command: --launch 'torchrun --nproc_per_node 8'
  --shard            spread models over these processes (FSDP), for what does not fit into one's memory
  --device-batch N   examples that a process takes at a time; the gradients of more are added up
  --deterministic    only deterministic algorithms
  --sweep FILE       execute a notebook for each cell of a grid, such as notebooks/sweeps/gatherings.yaml
  --jobs N           cells at a time (1)
  --on WHERE         run the cells here (local), as Slurm jobs (slurm), or on a Dask scheduler (its address)
  --version          the library's version
  --help             this text

Profiles:
TEXT
    local file
    for file in notebooks/profiles/*.yaml; do # each says on its first line what it is
        printf '  %-18s %s\n' "$(basename "$file" .yaml)" "$(sed -n '1s/^# *//; 1s/[:.]$//; 1p' "$file")"
    done
    cat <<'TEXT'

The environment is the active one if it satisfies pyproject.toml; else conda's in .conda (from environment.yml)
where there is conda; else a virtual environment in .venv. ONES_PYTHON names the Python that makes .venv; with
ONES_LOCKED=1 it has exactly the versions of requirements.lock.
The tests run in as many processes as there are cores, up to 8 ("test -n 0": in one, as do named test files).
The tests open a notebook in Chromium or Chrome; where there is none, they get Debian's or Ubuntu's package if run as
root (in a container, say), else that test is skipped.
TEXT
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --version) sed -n 's/^version = "\(.*\)"/ones_lib \1/p' pyproject.toml; exit 0 ;;
esac

# Whether the Python $1 has every requirement of pyproject.toml (and of its test extra, if $2 is test).
satisfies() {
    "$1" - "${2:-}" 2>/dev/null <<'PY'
import sys, tomllib
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + (project["optional-dependencies"]["test"] if sys.argv[1] == "test" else [])
ok = sys.version.split()[0].rstrip("+") in SpecifierSet(project["requires-python"])
ok = ok and all(version(r.name) in r.specifier for r in map(Requirement, wanted))
sys.exit(not ok)
PY
}

# Run a command that makes the environment in folder $1, unless it stands there whole, made from these very files.
make_once() {
    local folder=$1 stamp
    shift
    stamp=$(cat pyproject.toml environment.yml ${ONES_LOCKED:+requirements.lock} | cksum)
    if [ "$(cat "$folder/.made-from" 2>/dev/null)" != "$stamp" ]; then
        "$@"
        echo "$stamp" >"$folder/.made-from"
    fi
}

make_conda() {
    rm -rf .conda
    echo "run_all.sh: making a conda environment in .conda from environment.yml" >&2
    "$1" env create --quiet --yes --prefix .conda --file environment.yml
    .conda/bin/python -m pip install --quiet --no-deps --editable . >&2 # for JupyterLab
}

make_venv() {
    echo "run_all.sh: making a virtual environment in .venv from ${ONES_LOCKED:+requirements.lock, for }pyproject.toml (a few minutes, several GB)" >&2
    "$1" -m venv --clear .venv
    if [ -n "${ONES_LOCKED:-}" ]; then
        .venv/bin/python -m pip install --quiet --progress-bar off --require-hashes --requirement requirements.lock
        .venv/bin/python -m pip install --quiet --progress-bar off --no-deps --editable .
    else
        .venv/bin/python -m pip install --quiet --progress-bar off --editable '.[test]'
    fi
}

# A browser for the test of the widgets. What can't be had makes that test skip, and say so.
get_browser() {
    local name
    for name in chromium chromium-browser google-chrome chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "run_all.sh: installing the package chromium, for the test of the widgets in a browser" >&2
        (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium) \
            >/dev/null 2>&1 || echo "run_all.sh: could not install it" >&2
    fi
}

purpose=${1:-}
active=""
if [ -n "${VIRTUAL_ENV:-}" ]; then active="$VIRTUAL_ENV/bin/python"; elif [ -n "${CONDA_PREFIX:-}" ]; then active="$CONDA_PREFIX/bin/python"; fi
maker=""
for candidate in "${ONES_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        maker=$candidate
        break
    fi
done

if [ -n "${ONES_LOCKED:-}" ] && [ -n "$maker" ]; then
    make_once .venv make_venv "$maker"
    python=.venv/bin/python
    took="the virtual environment .venv, of requirements.lock"
elif [ -n "$active" ] && satisfies "$active" "$purpose"; then
    python=$active
    took="the active environment ${VIRTUAL_ENV:-$CONDA_PREFIX}"
elif [ -n "$maker" ] && satisfies "$maker" "$purpose"; then
    python=$maker
    took="the installed $maker"
elif conda=$(command -v mamba || command -v conda); then
    make_once .conda make_conda "$conda"
    python=.conda/bin/python
    took="the conda environment .conda"
elif [ -n "$maker" ]; then
    make_once .venv make_venv "$maker"
    python=.venv/bin/python
    took="the virtual environment .venv"
else
    echo "run_all.sh: expected Python 3.11 to 3.13 or conda, found neither; name one by ONES_PYTHON=/path/to/python" >&2
    exit 1
fi
echo "run_all.sh: using $took" >&2

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "$purpose" = test ]; then
    shift
    get_browser
    exec "$python" -m pytest "$@"
fi
exec "$python" -m ones_lib.study "$@"
