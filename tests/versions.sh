#!/usr/bin/env bash
# The library in a fresh environment, with the versions that it says it works with:
#   bash tests/versions.sh python3.11 lowest   # the lowest ones of settings.ini
#   bash tests/versions.sh python3.13          # the newest ones
# Runs the main job and the tests that need no browser and no notebook.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 which=${2:-newest}

env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT
"$python" -m venv "$env"
. "$env/bin/activate"
if [ "$which" = lowest ]; then
    pip install -q torch==2.4.1 torchvision==0.19.1 numpy==1.26.4 fastai==2.8.8 \
        fastcore==2.2.39 safetensors==0.4.5
fi
pip install -q . pytest pytest-xdist hypothesis psutil tokenizers accelerate
pip list 2> /dev/null | grep -E '^(torch|numpy|fastai|fastcore|safetensors|pandas) '
cp -r tests pyproject.toml nbs "$env"
cd "$env"
python --version
rnnlm-demo --epochs 1
pytest -q -n 2 tests/test_{state,models,cells,loader,generate,score,folder,interrupts}.py
