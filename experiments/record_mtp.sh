#!/usr/bin/env bash
# Every run behind results/mtp, one after another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/record_mtp.sh SET [PART ...]

Makes every run behind the committed tables and charts of multi-token prediction and leaves the records in
results/runs/SET; resumes where it stopped. About an hour on one core. PART (default: all):
  learning batch8 batch128     training runs of the three pipelines
  v32000 v151936               the loss alone, 1 to 8 heads, with its peers
  large                        hidden size 1,024, and 128 rows of 128 tokens
cut-cross-entropy is compared where it can be imported. Draw with
  .venv/bin/python visualization/charts_mtp.py --runs results/runs/SET --out results/mtp
PYTHON names the interpreter (default: .venv/bin/python).
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
runs=results/runs/$1
shift
train() { "$python" experiments/run_mtp_matrix.py --runs "$runs" "$@"; }
benchmark() { "$python" experiments/benchmark_mtp.py --runs "$runs" "$@"; }
quick="naive hidden hidden-small-tile whole-vocabulary logits seed-del cce-compile"

learning() { train --workload learning --losses hidden; }

batch8() {
  train --workload batch8 --pipelines baseline --losses naive logits hidden sequential
  train --workload batch8 --pipelines verifiable rho1 --losses naive hidden
}

batch128() {
  train --workload batch128 --losses naive hidden
  train --workload batch128 --pipelines baseline --losses sequential
}

heads() {
  benchmark --vocab "$1" --n_future 4 --rounds 5
  benchmark --vocab "$1" --n_future 1 --rounds 5
  for n_future in 2 8; do benchmark --vocab "$1" --n_future $n_future --methods $quick; done
}

v32000() { heads 32000; }
v151936() { heads 151936; }

large() {
  benchmark --vocab 32000 --hidden_size 1024 --batch 1 --methods $quick torch-chunked-256 whole-vocabulary-256
  benchmark --vocab 32000 --hidden_size 1024 --batch 16 --methods naive hidden whole-vocabulary-256
  benchmark --vocab 151936 --hidden_size 1024 --batch 1 --methods $quick
  benchmark --batch 128 --hidden_size 64 --methods naive seed-del logits hidden --part memory
}

[ $# -gt 0 ] || set -- learning batch8 batch128 v32000 v151936 large
for part in "$@"; do
  case $part in
    learning | batch8 | batch128 | v32000 | v151936 | large) "$part" ;;
    *) echo "record_mtp.sh: unknown part $part" >&2; exit 2 ;;
  esac
done
