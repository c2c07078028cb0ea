#!/usr/bin/env bash
# Every run behind the committed tables and charts, one after another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/record_results.sh SET

Makes every run behind the committed tables and charts and leaves the records in results/runs/SET; resumes where it
stopped. Takes about a day on 2 cores; the times need a machine that does nothing else. Draw them with
  ./visualize_results.sh --runs results/runs/SET --out results
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
runs=results/runs/$1
measure() { .venv/bin/python experiments/run_matrix.py --runs "$runs" "$@"; }

measure --workload cpu --variants baseline upstream upstream@1 string-level --k 2 4 8
measure --workload cpu --variants upstream upstream@1 string-level --k 16
measure --workload cpu --variants string-level --k 32 64
measure --workload cpu --variants shared-prefix --k 2 4 8 16 32 64
measure --workload cpu --variants string-level@1 string-level@2 string-level@3 string-level@4 string-level@5 --k 4
measure --workload published --variants baseline upstream upstream@1 string-level --k 2 4 8
measure --workload published --variants baseline-mb1 --k 2
measure --workload published --variants shared-prefix --k 2 4 8 16 32 64
measure --workload published_rollout2 --variants string-level --k 2 8
measure --workload origin --variants baseline string-level@1 as-published --k 2
measure --workload origin_two_prompts --variants baseline string-level@1 as-published --k 2 4
measure --workload learning --variants baseline string-level --k 4 --seeds 0 1 2
pairs() { .venv/bin/python experiments/compare_time.py --runs "$runs" --variants "$@"; }
pairs baseline string-level --workload cpu --k 4 --pairs 5
pairs baseline string-level --workload published --k 2 --pairs 3

# The shared prefix: whole trainers of a 57-million-parameter model, and for it and the tiny one training peaks and times,
# of which a step takes up to half an hour on one thread
layers="layers_3072_53 layers_1024_1024 layers_256_512"
for workload in $layers; do
  measure --workload $workload --variants upstream@1 upstream@1-mb1 string-level shared-prefix --k 2 8 --steps 1
done
measure --workload layers_3072_53 --variants shared-prefix --k 64 --steps 1
measure --workload layers_256_512 --variants shared-prefix --k 64 --steps 1
tiny="published balanced long_response"
.venv/bin/python experiments/training_peaks.py --out "$runs/training_peaks.csv" --workloads $layers $tiny
export OMP_NUM_THREADS=1
step() { pairs $1 shared-prefix --workload "$2" --k "$3" --pairs 1 --steps 1 "${@:4}"; }
all_branches() {  # two steps, of which the second counts
  pairs "${@:2}" shared-prefix --workload layers_3072_53 --k "$1" --pairs 1 --steps 2 --rows_per_forward "$1"
}
for workload in $layers $tiny; do
  for checkpointing in "" "--gradient_checkpointing True"; do
    for k in 2 4 8 16 32 64; do
      step "upstream upstream@1 upstream@1-mb1 string-level" $workload $k $checkpointing
    done
  done
done
for k in 4 8; do all_branches $k upstream@1 upstream@1-mb1 string-level; done
all_branches 16 upstream@1-mb1 string-level
step "upstream@1 upstream@1-mb1 string-level" layers_3072_53 8 --gradient_checkpointing True --rows_per_forward 8
# All rows that are out of memory with an allocator that keeps it, and not with glibc's
step upstream@1 layers_256_512 32 --allocator glibc
step upstream@1 layers_1024_1024 16 --allocator glibc
for workload in layers_3072_53 layers_1024_1024; do
  step upstream@1 $workload 32 --gradient_checkpointing True --allocator glibc
done
for workload in layers_3072_53 layers_1024_1024; do step upstream@1 $workload 8 --pairs 3; done
for k in 2 4; do step upstream@1 layers_256_512 $k --pairs 3; done
for k in 2 4 8; do step upstream@1 published $k --pairs 3; done
