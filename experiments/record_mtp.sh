#!/usr/bin/env bash
# Every run behind results/mtp, one after another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/record_mtp.sh SET

Makes every run behind the committed table and charts of multi-token prediction and leaves the records in
results/runs/SET; resumes where it stopped. Takes about 30 minutes on 2 cores. Draw them with
  .venv/bin/python visualization/charts_mtp.py --runs results/runs/SET --out results/mtp
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
runs=results/runs/$1
train() { .venv/bin/python experiments/run_mtp_matrix.py --runs "$runs" "$@"; }
benchmark() { .venv/bin/python experiments/benchmark_mtp.py --runs "$runs" "$@"; }

train --workload learning --losses hidden
train --workload batch8 --pipelines baseline --losses naive logits hidden sequential
train --workload batch8 --pipelines verifiable rho1 --losses naive hidden
train --workload batch128 --pipelines baseline --losses naive hidden sequential
train --workload batch128 --pipelines verifiable rho1 --losses hidden
ours="naive seed-del logits hidden hidden-small-tile"
for vocab in 32000 151936; do
  for n_future in 1 4; do benchmark --vocab $vocab --n_future $n_future; done
  for n_future in 2 8; do benchmark --vocab $vocab --n_future $n_future --methods $ours; done
done
benchmark --vocab 151936 --batch 128 --hidden_size 64 --methods naive seed-del logits hidden --part memory
