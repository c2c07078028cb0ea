#!/usr/bin/env bash
# What there is today: RLOO of TRL v0.20.0 and v1.16.0, unpatched, at rloo_k = 2, 4, 8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./run_baseline-rloo.sh [--k K ...] [--workload NAME] [options]

Measures the variants 'baseline' (TRL v0.20.0 as released) and 'upstream' (TRL v1.16.0 as released) at rloo_k = 2, 4, 8,
one fresh process after another under the memory monitor. An out-of-memory under the workload's budget is a result.
Records go to results/runs/local/<workload>/; what is done is skipped, --force repeats it.
Takes about 6 minutes with the default workload on 2 cores.

Workloads (experiments/configs): cpu (the default without a GPU), published (3,072 + 53 tokens), published_32gb (the
same in 32 GB; the default with a GPU), balanced (1,024 + 1,024 tokens). Every setting of experiments/config.py is an
option as well.
EOF
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "run_baseline-rloo.sh: run ./setup_env.sh first" >&2; exit 1; }
exec .venv/bin/python experiments/run_matrix.py --variants baseline upstream "$@"
