#!/usr/bin/env bash
# All checks and measurements that need a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/run_gpu_checks.sh SET [PART]

Runs the tests that need a CUDA device, then, resumed where it stopped, one PART (default: all of them):
  published   the published experiment in 32 GB, every variant at rloo_k = 2, 4, 8, ours up to 64, and paired step times
  layers      the 57-million-parameter model: training peaks and paired step times of the shared prefix
  memory      the memory strategies that one GPU can show: recomputation, offloaded activations, gradients and AdamW on the
              host (ZeRO-2 with a world of one), a recovery from a real out-of-memory, rows of 14,100 tokens
  qwen3       shapes of Qwen3-0.6B and 4B in bfloat16 with LoRA, 8 completions of 256 tokens, 2K and 8K prompts: stock,
              ours, and stock with FlashAttention-2 where it is installed
Records go to results/runs/SET. Each part takes under 10 minutes on a data-centre GPU. PYTHON names the interpreter
(default: .venv/bin/python).
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
runs=results/runs/$1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "run_gpu_checks.sh: $python sees no CUDA device" >&2; exit 1; }
matrix() { "$python" experiments/run_matrix.py --runs "$runs" "$@"; }
pairs() { "$python" experiments/compare_time.py --runs "$runs" "$@"; }

published() {
  matrix --workload published_32gb --variants baseline upstream string-level shared-prefix
  matrix --workload published_32gb --variants string-level shared-prefix --k 16 32 64
  pairs --workload published_32gb --variants baseline string-level --k 4 --pairs 3
  pairs --workload published_32gb --variants upstream shared-prefix --k 8 --pairs 3
}

layers() {
  for workload in layers_3072_53 layers_1024_1024 layers_256_512; do
    matrix --workload $workload --variants upstream shared-prefix --k 2 8 --budget_gib 64
    pairs --workload $workload --variants upstream shared-prefix --k 8 --pairs 3 --budget_gib 64
  done
  matrix --workload layers_3072_53 --variants shared-prefix --k 16 32 64 --budget_gib 64
}

qwen3() {  # the allocator's own peaks, without the live-bytes meter
  for workload in qwen3_0_6b_2k qwen3_0_6b_8k qwen3_4b_2k; do
    matrix --workload $workload --variants upstream shared-prefix --k 8 --count_live_bytes False
  done
  if "$python" -c 'import flash_attn' 2> /dev/null; then
    "$python" experiments/run_matrix.py --runs "$runs-flash" --workload qwen3_0_6b_8k --variants upstream --k 8 \
      --count_live_bytes False --attn_implementation flash_attention_2
  fi
}

memory() {  # records in results/memory/SET; the table and the chart need several GPUs as well
  "$python" experiments/run_memory_strategies.py --runs "results/memory/${runs##*/}" --only none_1 ratio-half_1 \
    ratio-all_1 selective-half_1 selective-all_1 activations-offloaded_1 oom-recovery_1 zero2_1 long_1
}

"$python" -m pytest -q -rs tests/test_gpu.py tests/test_logprobs.py tests/test_live_bytes.py
for part in ${2:-published layers memory qwen3}; do
  case $part in
    published | layers | memory | qwen3) "$part" ;;
    *) echo "run_gpu_checks.sh: unknown part $part; known: published, layers, memory, qwen3" >&2; exit 2 ;;
  esac
done
