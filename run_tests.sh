#!/usr/bin/env bash
# Sets up what is missing, then runs the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./run_tests.sh [--all] [pytest options]

Sets up what is missing (./setup_env.sh), checks the patch series (export and import give the identical tree) and runs
the quick tests. Takes about 20 minutes on 2 cores.
--all adds the slow proofs: the full parity grids, every patch in float32 and float64; about two hours.
EOF
    exit 0 ;;
esac
./setup_env.sh
# A quick test that hangs ends the run, with the stack of every thread
selection=(-m "not slow" -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true)
options=()
for word in "$@"; do
  if [ "$word" = --all ]; then selection=(); else options+=("$word"); fi
done
export CUDA_VISIBLE_DEVICES=  # these are the tests of a CPU; experiments/run_gpu_checks.sh has those of a GPU
echo "run_tests.sh: patch series"
.venv/bin/python trl/fork.py check
echo "run_tests.sh: style"
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
echo "run_tests.sh: tests ${selection[*]:-(all)}"
exec .venv/bin/python -m pytest -q --durations=10 "${selection[@]}" "${options[@]}"
