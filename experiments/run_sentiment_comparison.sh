#!/usr/bin/env bash
# PPO against RLOO (k = 2, 4, 8) and GRPO on the sentiment task, at equal samples.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=results/runs/local/sentiment
case "${1:-}" in
  -h | --help)
    cat <<USAGE
Usage: experiments/run_sentiment_comparison.sh [learning] [memory] [--runs FOLDER] [--only NAME] [--seed N]

Trains every algorithm on the sentiment task, each run in a fresh process under the memory monitor, and draws the chart
and the table into results/local/. Without a part both are made; a run that is done is skipped.

  learning  3 seeds of each algorithm on the same number of samples: reward, success rate, KL, processor time
  memory    3 batches with live tensor bytes counted, with adapters and with all weights trained

--runs FOLDER  folder of the records (default $runs); --only NAME  one algorithm: ppo, rloo_k2, rloo_k4, rloo_k8, grpo_k4
--seed N       one seed
About 30 minutes on one core; --only and --seed split it.
USAGE
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "run_sentiment_comparison.sh: run ./setup_env.sh first" >&2; exit 1; }
parts=() only= seeds=(0 1 2)
while [ $# -gt 0 ]; do
  case $1 in
    learning | memory) parts+=("$1") ;;
    --runs) runs=$2; shift ;;
    --only) only=$2; shift ;;
    --seed) seeds=("$2"); shift ;;
    *) echo "run_sentiment_comparison.sh: unknown word '$1' (-h for help)" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(learning memory)
scratch=$runs/.scratch-$$
mkdir -p "$scratch"
trap 'rm -rf "$scratch"' EXIT
failed=0

# run_one RECORD OPTIONS...: skipped where the record says ok
run_one() {
  local record=$runs/$1.json
  shift
  if grep -qs '"status": "ok"' "$record"; then echo "$record: done before"; return; fi
  "${allocator[@]}" .venv/bin/python experiments/memory_monitor.py \
    --record "$record" --timeline "$scratch/timeline.csv" --quiet -- \
    .venv/bin/python experiments/train_sentiment.py --config experiments/configs/sentiment/learns.yaml \
    --record "$record" --output_dir "$scratch/model" --restart True "$@" || failed=1
  rm -rf "$scratch/model" "${record%.json}.log"
  echo "$record: done"
}

for part in "${parts[@]}"; do
  allocator=(env)  # resident memory is honest where freed blocks go back, but that takes time
  [ "$part" != memory ] || allocator+=(MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536)
  for name in ppo rloo_k2 rloo_k4 rloo_k8 grpo_k4; do
    if [ -n "$only" ] && [ "$only" != "$name" ]; then continue; fi
    options=(--algorithm "${name%_k*}")
    [ "$name" = ppo ] || options+=(--k "${name##*_k}")
    case $part in
      learning) for seed in ${seeds[*]}; do run_one "learning/${name}_seed$seed" "${options[@]}" --seed $seed; done ;;
      memory)
        short=(--epochs 120 --count_live_bytes True --samples_per_prompt 2)
        run_one "memory/${name}" "${options[@]}" "${short[@]}"
        run_one "memory/${name}_all_weights" "${options[@]}" "${short[@]}" --lora_rank 0 --value_model full ;;
    esac
  done
done
[ $failed = 0 ] || { echo "run_sentiment_comparison.sh: a run failed, see its record" >&2; exit 1; }
for part in learning memory; do [ -d "$runs/$part" ] || exit 0; done
exec .venv/bin/python visualization/sentiment_charts.py --runs "$runs" --out results/local
