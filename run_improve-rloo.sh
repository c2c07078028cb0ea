#!/usr/bin/env bash
# The improved RLOO: the patched v0.20.0 tree (string-level) at rloo_k = 2, 4, 8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./run_improve-rloo.sh [--k K ...] [--workload NAME] [options]

Measures the variant 'string-level' (TRL v0.20.0 with our patch series) at rloo_k = 2, 4, 8, one fresh process after
another under the memory monitor. Records go to results/runs/local/<workload>/; what is done is skipped, --force
repeats it. Takes about 1 minute with the default workload on 2 cores.

Workloads and options are those of ./run_baseline-rloo.sh -h.
EOF
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "run_improve-rloo.sh: run ./setup_env.sh first" >&2; exit 1; }
exec .venv/bin/python experiments/run_matrix.py --variants string-level "$@"
