#!/usr/bin/env bash
# All checks and measurements that need a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/run_gpu_checks.sh SET

Runs the tests that need a CUDA device, then the published experiment in 32 GB (baseline, upstream and string-level at
rloo_k = 2, 4, 8; string-level up to 64) and paired step times. Records go to results/runs/SET; resumes where it
stopped. Takes under 10 minutes on a data-centre GPU. PYTHON names the interpreter (default: .venv/bin/python).
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
runs=results/runs/$1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "run_gpu_checks.sh: $python sees no CUDA device" >&2; exit 1; }
"$python" -m pytest -q -rs tests/test_gpu.py tests/test_logprobs.py tests/test_live_bytes.py
"$python" experiments/run_matrix.py --runs "$runs" --workload published_32gb --variants baseline upstream string-level
"$python" experiments/run_matrix.py --runs "$runs" --workload published_32gb --variants string-level --k 16 32 64
"$python" experiments/compare_time.py --runs "$runs" --workload published_32gb --variants baseline string-level --k 4
