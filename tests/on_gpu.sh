#!/usr/bin/env bash
# What one GPU shows: exactness on the device, speed of dispatch and of whole models, CIFAR-10. Writes gpu_*.csv.
#   tests/on_gpu.sh OUT CIFAR10          on a GPU, in about eight minutes; CIFAR10 is a folder in ImageNet's layout
#   tests/on_gpu.sh OUT "" smoke         every step at sizes that mean nothing, on any device
# It needs a Python with PyTorch (PYTHON names it). Missing packages are installed by pip, which takes PIP_NO_INDEX and
# PIP_FIND_LINKS for a machine that reaches no index.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=${2:+$(cd "$2" && pwd)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c "import accelerate, babel, filelock, pandas, psutil, pytest, scipy, timm, tokenizers, transformers, yaml" 2>/dev/null; then
    "$python" -m pip install --quiet accelerate "babel==2.18.*" filelock matplotlib pandas psutil pytest scipy seaborn timm tokenizers transformers pyyaml
fi
"$python" -m pytest -q tests/test_device.py
"$python" tests/on_gpu.py "$out" --data-dir "$data" --profile "${3:-gpu}"
