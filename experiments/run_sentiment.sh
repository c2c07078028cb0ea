#!/usr/bin/env bash
# The sentiment recipe: one command trains it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  -h | --help)
    cat <<USAGE
Usage: experiments/run_sentiment.sh [options]

Teaches a small language model by PPO to continue "I feel so", "This makes me" and "I am really" with a happy word. The
adapter, its tokenizer, the curve and the record go to trained_model/ (--output_dir). After a kill the same command goes
on where the last checkpoint was, with the same result.

  experiments/run_sentiment.sh
      the settings of the document that the recipe follows (under a minute; the tiny model learns next to nothing)
  experiments/run_sentiment.sh --config experiments/configs/sentiment/learns.yaml
      settings with which the default model learns (a few minutes on 2 cores)
  experiments/run_sentiment.sh --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --load_in_bits 4
      the hub's model, or a local folder; 4 or 8 bits where there is a GPU
  experiments/run_sentiment.sh --algorithm rloo --k 4        (or grpo)

Every setting of experiments/sentiment/config.py is an option and a YAML key. The default model needs no download: a
small Llama is pre-trained here once, in about half a minute, and kept in .cache/. docs/sentiment.md says what helps
when it is too slow, out of memory, or finds no happy words. Comparison: experiments/run_sentiment_comparison.sh.
USAGE
    exit 0 ;;
esac
[ -x "$root/.venv/bin/python" ] || { echo "run_sentiment.sh: run ./setup_env.sh first" >&2; exit 1; }
exec "$root/.venv/bin/python" "$root/experiments/train_sentiment.py" "$@"
