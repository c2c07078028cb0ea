#!/usr/bin/env bash
# Tables and charts from recorded runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help)
    cat <<EOF
Usage: ./visualize_results.sh [--runs DIR] [--out DIR] [--strict]

Merges the recorded runs into CSV files and draws the charts. By default your own runs (results/runs/local) are drawn
into results/local. The committed charts of results/ come from
  ./visualize_results.sh --runs results/runs/cpu-2core --out results
A missing run is an error that names it; a chart that lacks its runs is listed (with --strict: an error).
Takes about 20 seconds.
EOF
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "visualize_results.sh: run ./setup_env.sh first" >&2; exit 1; }
case " $* " in
  *" --runs "*) ;;
  *) set -- --runs results/runs/local --out results/local "$@" ;;
esac
exec .venv/bin/python visualization/create_charts.py "$@"
