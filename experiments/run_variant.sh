#!/usr/bin/env bash
# What the run_*_rloo.sh beside it share: one setting of one variant under the memory monitor.
#   run_variant.sh VARIANT K [options of run_matrix.py and train.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
variant=$1
shift
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/run_${variant}_rloo.sh K [--workload NAME] [options]

Runs the variant '$variant' once with rloo_k = K in a fresh process under the memory monitor and leaves the record
results/runs/local/<workload>/${variant}_kK.json with its time line. A run that is done is skipped; --force repeats it.
Takes 15 seconds to 2 minutes with the default workload on 2 cores.

Workloads are the files of experiments/configs; every setting of experiments/config.py is an option, for example
--steps 5 --budget_gib 12 --model Qwen/Qwen3-0.6B.
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2
    ;;
esac
k=$1
shift
[[ $k =~ ^[0-9]+$ ]] || { echo "run_${variant}_rloo.sh: K is a whole number, got '$k' (-h for help)" >&2; exit 2; }
[ -x "$root/.venv/bin/python" ] || { echo "run_${variant}_rloo.sh: run ./setup_env.sh first" >&2; exit 1; }
exec "$root/.venv/bin/python" "$root/experiments/run_matrix.py" --variants "$variant" --k "$k" "$@"
