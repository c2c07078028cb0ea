#!/usr/bin/env bash
# The improved RLOO: the patched trees, v0.20.0 (string-level) and v1.16.0 (shared-prefix), at rloo_k = 2, 4, 8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./run_improve-rloo.sh [--k K ...] [--workload NAME] [options]

Measures the variants 'string-level' (TRL v0.20.0 with our patch series) and 'shared-prefix' (TRL v1.16.0 with ours) at
rloo_k = 2, 4, 8, one fresh process after another under the memory monitor. Records go to
results/runs/local/<workload>/; what is done is skipped, --force repeats it. Takes about 2 minutes with the default
workload on 2 cores.

Workloads and options are those of ./run_baseline-rloo.sh -h.
EOF
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "run_improve-rloo.sh: run ./setup_env.sh first" >&2; exit 1; }
exec .venv/bin/python experiments/run_matrix.py --variants string-level shared-prefix "$@"
