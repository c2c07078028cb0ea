#!/usr/bin/env bash
# Multi-token prediction: trains one workload with the given pipelines and ways to compute the loss; -h for help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: experiments/run_mtp.sh [--workload NAME] [--pipelines P ...] [--losses L ...] [options]

Trains a small model with several prediction heads, one fresh process after another under the memory monitor. Records
go to results/runs/local/mtp/<workload>/; what is done is skipped, --force repeats it.

  --workload   learning (default), batch128, batch8: the files of experiments/configs/mtp
  --pipelines  baseline, verifiable, rho1 (default: all three)
  --losses     hidden (default), sequential, logits, naive: how the same loss is computed, see docs/mtp.md

Every setting of experiments/mtp_config.py is an option, for example --steps 100 --n_future 8 --budget_gib 2
--dataset rows.jsonl --tokenizer Qwen/Qwen3-0.6B. The default takes about 3 minutes on 2 cores.
EOF
    exit 0 ;;
esac
[ -x "$root/.venv/bin/python" ] || { echo "run_mtp.sh: run ./setup_env.sh first" >&2; exit 1; }
exec "$root/.venv/bin/python" "$root/experiments/run_mtp_matrix.py" "$@"
