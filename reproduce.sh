#!/usr/bin/env bash
# From a bare clone to the table and the charts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./reproduce.sh [--workload NAME] [options]

Sets up what is missing (./setup_env.sh), measures the baselines (./run_baseline-rloo.sh) and the improved RLOO
(./run_improve-rloo.sh) at rloo_k = 2, 4, 8, and draws the tables and charts (./visualize_results.sh) into
results/local. Safe to run again: it resumes where it stopped. Options go to the two measuring scripts.
Takes 10 to 20 minutes on 2 cores, set-up included.
EOF
    exit 0 ;;
esac
./setup_env.sh
./run_baseline-rloo.sh "$@"
./run_improve-rloo.sh "$@"
./visualize_results.sh
echo "reproduce.sh: the table is results/local/peak_memory.md, the charts lie beside it"
