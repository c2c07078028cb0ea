#!/usr/bin/env bash
# All checks and measurements that need a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help | "")
    cat <<EOF
Usage: experiments/run_gpu_checks.sh SET [PART]

Runs one PART, resumed where it stopped (default: all, one after another, also after one that failed):
  tests       the tests that need a CUDA device
  published   the published experiment in 32 GB, every variant at rloo_k = 2, 4, 8, ours up to 64, and paired step times
  layers      the 57-million-parameter model in bfloat16: training peaks and paired step times of the shared prefix
  qwen3       shapes of Qwen3-0.6B and 4B in bfloat16 with LoRA, 8 completions of 256 tokens, 2K and 8K prompts: stock with
              all rows and row by row, ours, and stock with FlashAttention-2 where it is installed; paired step times
  sentiment   the sentiment recipe in TinyLlama's shape with random weights: memory and time of PPO, RLOO and GRPO, and
              PPO in 8 and 4 bits where bitsandbytes is installed
  mtp         the multi-token-prediction loss in bfloat16, 1 to 8 heads, against its peers (Liger's and
              cut-cross-entropy's kernels where they are installed), and 128 rows of 128 tokens
  planner     lowmem.plan: 24 configurations, allocated and reserved bytes against the prediction (SET/planner.json), and
              the calibration of this card (SET/calibration.json)
  memory      the memory strategies that one GPU can show: recomputation, offloaded activations, gradients and AdamW on the
              host (ZeRO-2 with a world of one), a recovery from a real out-of-memory, rows of 14,100 tokens
Records go to results/runs/SET, those of the part memory to results/memory/SET. Each part takes under 10 minutes on a
data-centre GPU; published needs 32 GB of device memory, layers 64 GiB. PYTHON names the interpreter (default:
.venv/bin/python).
EOF
    [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
parts="tests published layers qwen3 sentiment mtp planner memory"
if [ $# -eq 1 ]; then
  failed=()
  for part in $parts; do experiments/run_gpu_checks.sh "$1" "$part" || failed+=("$part"); done
  [ ${#failed[@]} -eq 0 ] || { echo "run_gpu_checks.sh: failed: ${failed[*]}" >&2; exit 1; }
  exit 0
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
python=${PYTHON:-.venv/bin/python}
runs=results/runs/$1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "run_gpu_checks.sh: $python sees no CUDA device" >&2; exit 1; }
matrix() { "$python" experiments/run_matrix.py --runs "$runs" "$@"; }
pairs() { "$python" experiments/compare_time.py --runs "$runs" "$@"; }

tests() { "$python" -m pytest -q -rs tests/test_gpu.py tests/test_logprobs.py tests/test_live_bytes.py; }

published() {
  matrix --workload published_32gb --variants baseline upstream string-level shared-prefix
  matrix --workload published_32gb --variants string-level shared-prefix --k 16 32 64
  pairs --workload published_32gb --variants baseline string-level --k 4 --pairs 3
  pairs --workload published_32gb --variants upstream shared-prefix --k 8 --pairs 3
}

# In bfloat16, as one trains on a GPU: in float32 no fused kernel of CUDA takes grouped heads, and attention scores of
# (P + R)^2 would hide what is measured
layers() {
  local bf16="--dtype bfloat16 --budget_gib 64"
  for workload in layers_3072_53 layers_1024_1024 layers_256_512; do
    matrix --workload $workload --variants upstream shared-prefix --k 2 8 $bf16
    pairs --workload $workload --variants upstream upstream-mb1 shared-prefix --k 8 --pairs 3 $bf16
    pairs --workload $workload --variants upstream shared-prefix --k 8 --pairs 3 $bf16 --rows_per_forward 8
  done
  matrix --workload layers_3072_53 --variants shared-prefix --k 16 32 64 $bf16
}

qwen3() {  # the allocator's own peaks, without the live-bytes meter; stock with all rows may be out of memory
  for workload in qwen3_0_6b_2k qwen3_0_6b_8k qwen3_4b_2k; do
    matrix --workload $workload --variants upstream upstream-mb1 shared-prefix --k 8 --count_live_bytes False
    pairs --workload $workload --variants upstream-mb1 shared-prefix --k 8 --pairs 1
    pairs --workload $workload --variants upstream-mb1 shared-prefix --k 8 --pairs 1 --rows_per_forward 8
  done
  if "$python" -c 'import flash_attn' 2> /dev/null; then
    "$python" experiments/run_matrix.py --runs "$runs-flash" --workload qwen3_0_6b_8k --variants upstream upstream-mb1 \
      --k 8 --count_live_bytes False --attn_implementation flash_attention_2
  fi
}

sentiment() {
  local model name scratch
  model=$("$python" -c '
import sys
sys.path[:0] = ["experiments", "."]
from sentiment.base_model import TINYLLAMA, BaseModel, base_model_folder
print(base_model_folder(BaseModel(**TINYLLAMA), log=lambda *text, **_: None))' | tail -n 1)
  scratch=$(mktemp -d)
  recipe() {  # NAME OPTIONS...: skipped where the record says ok
    name=$1
    shift
    if grep -qs '"status": "ok"' "$runs/sentiment/$name.json"; then return; fi
    "$python" experiments/train_sentiment.py --model "$model" --dtype bfloat16 --epochs 20 --samples_per_prompt 10 \
      --output_dir "$scratch" --restart True --record "$runs/sentiment/$name.json" "$@"
  }
  recipe ppo
  recipe rloo_k2 --algorithm rloo --k 2
  recipe grpo_k2 --algorithm grpo --k 2
  if "$python" -c 'import bitsandbytes' 2> /dev/null; then
    recipe ppo_8bit --load_in_bits 8
    recipe ppo_4bit --load_in_bits 4
  fi
  rm -rf "$scratch"
}

mtp() {
  benchmark() { "$python" experiments/benchmark_mtp.py --runs "$runs" --dtype bfloat16 --hidden_size 1024 "$@"; }
  for vocab in 32000 151936; do
    for n_future in 1 2 4 8; do benchmark --vocab $vocab --n_future $n_future --batch 8 --length 512 --rounds 5; done
  done
  benchmark --batch 128 --methods naive logits hidden whole-vocabulary cce-kernel liger
}

planner() {
  "$python" experiments/validate_planner_cuda.py --runs "$runs"
  "$python" -m lowmem.plan --calibrate "$runs/calibration.json"
}

memory() {  # records in results/memory/SET; the table and the chart need several GPUs as well
  "$python" experiments/run_memory_strategies.py --runs "results/memory/${runs##*/}" --only none_1 ratio-half_1 \
    ratio-all_1 selective-half_1 selective-all_1 activations-offloaded_1 oom-recovery_1 zero2_1 long_1
}

case " $parts " in
  *" $2 "*) "$2" ;;
  *) echo "run_gpu_checks.sh: unknown part $2; known: $parts" >&2; exit 2 ;;
esac
