#!/usr/bin/env bash
# The troubleshooting table of docs/sentiment.md, measured: every advice against the document's settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=${1:-results/runs/local/sentiment}/troubleshooting
case "${1:-}" in
  -h | --help)
    cat <<USAGE
Usage: experiments/run_sentiment_troubleshooting.sh [FOLDER]

Runs the sentiment recipe with the document's settings and with each advice for "too slow", "out of memory" and "no
happy words", one at a time, and prints the table. Records go to FOLDER/troubleshooting (default
results/runs/local/sentiment); what is done is skipped. About 8 minutes on one core.
USAGE
    exit 0 ;;
esac
[ -x .venv/bin/python ] || { echo "run_sentiment_troubleshooting.sh: run ./setup_env.sh first" >&2; exit 1; }

# run_one NAME OPTIONS...: skipped where the record says ok
run_one() {
  local record=$runs/$1.json
  shift
  if grep -qs '"status": "ok"' "$record"; then return; fi
  echo "$record"
  .venv/bin/python experiments/train_sentiment.py --record "$record" --output_dir "$runs/.scratch" --restart True "$@" \
    > "${record%.json}.log" 2>&1 || { tail -n 3 "${record%.json}.log" >&2; exit 1; }
  rm -rf "$runs/.scratch" "${record%.json}.log"
}

mkdir -p "$runs" "$runs/../learning"
memory=(--epochs 10 --count_live_bytes True --samples_per_prompt 2)
run_one memory_document "${memory[@]}"
run_one memory_batch_5 "${memory[@]}" --batch_size 5 --mini_batch_size 1
run_one memory_lora_rank_8 "${memory[@]}" --lora_rank 8
run_one memory_checkpointing "${memory[@]}" --gradient_checkpointing True
run_one memory_rloo "${memory[@]}" --algorithm rloo --k 2
run_one words_document
run_one words_epochs_200 --epochs 200
run_one words_learning_rate_3e-5 --learning_rate 3e-5
run_one words_ppo_epochs_6 --ppo_epochs 6
run_one words_learning_rate_2e-3 --learning_rate 2e-3
run_one ../learning/ppo_seed0 --config experiments/configs/sentiment/learns.yaml --seed 0
run_one slow_mini_batch_10 --mini_batch_size 10 --gradient_accumulation_steps 1
run_one slow_batch_20 --batch_size 20 --mini_batch_size 20 --gradient_accumulation_steps 1
run_one slow_epochs_50 --epochs 50
exec .venv/bin/python visualization/sentiment_troubleshooting.py --runs "$runs"
