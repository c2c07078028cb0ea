"""Peak memory and time of one multi-token-prediction loss with its backward, computed in every known way, in one run.

    python experiments/benchmark_mtp.py --vocab 151936 --n_future 4

Memory: each method in a fresh process, in bytes of live tensors above its inputs (the gradients it returns included)
and as the rise of resident memory. What does not fit is counted on fake tensors and marked so. Time: all methods in
turn, round after round, in one process without a meter. Exactness: loss and gradients against the naive ones of the
same process. The record is results/runs/<set>/benchmark/<case>.json; a case that is done is skipped.

cut-cross-entropy is measured where it can be imported (put it on PYTHONPATH), Liger and cut-cross-entropy's own kernel
where there is a GPU as well.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from run_matrix import MALLOC  # noqa: E402
from train import environment, status_kib, write_record  # noqa: E402

from lowmem.live_bytes import LiveBytes  # noqa: E402
from lowmem.mtp_logits import compute_mtp_ce_loss  # noqa: E402
from lowmem.mtp_loss import mtp_ce_loss  # noqa: E402
from lowmem.mtp_targets import shift_labels  # noqa: E402
from mtp_config import library_sha256  # noqa: E402

SMALL_TILE = (128, 512)  # 256 KiB in float32, for comparison with what holds no more than that
NAIVE_PEAK = 3.6  # of the naive loss, in sizes of its logits (measured: 3.5 at 4 heads, more at 1)
LARGEST_NAIVE_BYTES = 4.6 * 2**30  # of live tensors; what needs more is counted on fake tensors
FAKE = ("naive", "seed-del", "logits")


def naive(hidden, weight, labels):
    logits = hidden @ weight.t()  # (B, S, n, V)
    total, n_future = 0.0, hidden.shape[2]
    for k in range(1, n_future + 1):
        ce = F.cross_entropy(logits[:, :-k, k - 1].reshape(-1, weight.shape[0]), labels[:, k:].reshape(-1))
        total = total + ce
    return total / n_future


def seed_del(hidden, weight, labels):
    """The seed's remedy: scalars summed up, and every name deleted after its head."""
    logits = hidden @ weight.t()
    total, n_future = 0.0, hidden.shape[2]
    for k in range(1, n_future + 1):
        logits_k, labels_k = logits[:, :-k, k - 1], labels[:, k:]
        ce = F.cross_entropy(logits_k.reshape(-1, weight.shape[0]), labels_k.reshape(-1), reduction="none")
        total = total + ce.sum() / ce.numel()
        del logits_k, labels_k, ce
    return total / n_future


def ours_from_logits(hidden, weight, labels):
    return compute_mtp_ce_loss(hidden @ weight.t(), labels, inplace_backward=True)["weighted_ce_loss"]


def ours(hidden, weight, labels):
    return mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"]


def ours_small_tile(hidden, weight, labels):
    tile = dict(chunk_tokens=SMALL_TILE[0], chunk_vocab=SMALL_TILE[1])
    return mtp_ce_loss(hidden, weight, labels, **tile)["weighted_ce_loss"]


def per_head(one):
    """The mean over the heads of `one(rows (N, H), weight, targets (N,))`."""

    def loss(hidden, weight, labels):
        heads = range(1, hidden.shape[2] + 1)
        rows = ((hidden[:, :-k, k - 1].reshape(-1, hidden.shape[-1]), labels[:, k:].reshape(-1)) for k in heads)
        return sum(one(h, weight, y) for h, y in rows) / len(heads)

    return loss


def one_call(one):
    """All heads as rows of one call of `one(...) -> (N,)`, weighted so that the result is the mean over heads."""

    def loss(hidden, weight, labels):
        targets = shift_labels(labels, None, hidden.shape[2])
        scale = (targets != -100) / ((targets != -100).sum((0, 1)) * hidden.shape[2])
        losses = one(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
        return (losses * scale.reshape(-1)).sum()

    return loss


def torch_chunked(reduction):
    def one(hidden, weight, targets):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)

    return one


def cut_cross_entropy(implementation):
    def one(hidden, weight, targets):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, impl=implementation, reduction="none", filter_eps=None)

    return one


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


METHODS = {
    "naive": naive,
    "seed-del": seed_del,
    "torch-chunked-mean": per_head(torch_chunked("mean")),
    "torch-chunked-none": one_call(torch_chunked("none")),
    "cce-compile": one_call(cut_cross_entropy("torch_compile")),
    "cce-kernel": one_call(cut_cross_entropy("cce")),
    "liger": per_head(liger),
    "logits": ours_from_logits,
    "hidden": ours,
    "hidden-small-tile": ours_small_tile,
}
SLOW = ("torch-chunked-mean", "torch-chunked-none")


def available() -> dict[str, str | None]:
    """Every method, with the reason if it cannot run here."""
    reasons = dict.fromkeys(METHODS)
    for method, package in (("cce-compile", "cut_cross_entropy"), ("cce-kernel", "cut_cross_entropy")):
        if importlib.util.find_spec(package) is None:
            reasons[method] = f"{package} is not installed"
    if importlib.util.find_spec("liger_kernel") is None:
        reasons["liger"] = "liger_kernel is not installed"
    if not torch.cuda.is_available():
        reasons |= dict.fromkeys(("cce-kernel", "liger"), "needs a GPU: pending")
    return reasons


def inputs(args):
    torch.manual_seed(0)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (args.batch, args.length, args.n_future, args.hidden_size)
    hidden = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden_size, device=device) / args.hidden_size**0.5).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(0, args.vocab, (args.batch, args.length), device=device)


def measure_memory(args) -> dict:
    """Of one method, in this process."""
    method = METHODS[args.measure]
    logits = args.batch * args.length * args.n_future * args.vocab * (4 if args.dtype == "float32" else 2)
    fake = args.measure in FAKE and NAIVE_PEAK * logits > LARGEST_NAIVE_BYTES and not torch.cuda.is_available()
    if fake:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            return {"counted_on": "fake tensors"} | count_live_bytes(method, inputs(args))
    tensors = inputs(args)
    if args.measure == "cce-compile":  # torch.compile does not run under a dispatch mode, and allocates to compile
        method(*tensors).backward()
        tensors[0].grad = tensors[1].grad = None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status_kib("VmRSS")
    if args.measure == "cce-compile":
        method(*tensors).backward()
        found = {"counted_on": "resident memory alone", "live_peak_bytes": None}
    else:
        found = {"counted_on": "real tensors"} | count_live_bytes(method, tensors)
    return found | {"rss_rise_bytes": (status_kib("VmHWM") - before) * 1024}


def count_live_bytes(method, tensors) -> dict:
    meter = LiveBytes()
    meter.track(tensors)
    before = meter.live_bytes
    with meter:
        method(*tensors).backward()
    hidden, weight, _ = tensors
    returned = sum(x.numel() * x.element_size() for x in (hidden, weight))
    return {"live_peak_bytes": meter.peak_bytes - before, "returned_gradient_bytes": returned}


def measure_times(args, methods: list[str]) -> dict:
    """`time_s` of every round and the distance from the naive loss and gradients, by method."""
    tensors = inputs(args)
    hidden, weight, _ = tensors
    reference, found = None, {method: {"time_s": []} for method in methods}

    def run(method):
        hidden.grad = weight.grad = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = METHODS[method](*tensors)
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss.detach()

    for number in range(args.rounds + 1):
        for method in methods:
            if method in SLOW and number not in range(1, 1 + args.slow_rounds):
                continue
            seconds, loss = run(method)
            if number:  # the first round warms up
                found[method]["time_s"].append(seconds)
            if method == "naive" and reference is None:
                reference = [loss, hidden.grad.clone(), weight.grad.clone()]
            if reference and "loss_difference" not in found[method]:
                distance = [
                    (a - b).abs().max().item() / b.abs().max().item()
                    for a, b in zip((hidden.grad, weight.grad), reference[1:])
                ]
                found[method]["loss_difference"] = (loss - reference[0]).abs().item()
                found[method]["gradient_difference_relative"] = max(distance)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--n_future", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="positions per row")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--rounds", type=int, default=3, help="of timing after one that warms up; 0 measures memory only"
    )
    parser.add_argument("--slow_rounds", type=int, default=1, help="of timing of PyTorch's chunked loss")
    parser.add_argument("--part", default="both", choices=("both", "memory", "time"), help="measured and merged apart")
    parser.add_argument("--runs", default="results/runs/local/mtp", help="folder of the records")
    parser.add_argument("--force", action="store_true", help="measure again what is done")
    parser.add_argument("--measure", choices=list(METHODS), help=argparse.SUPPRESS)  # the fresh process of one method
    args = parser.parse_args(argv)
    for name in ("vocab", "n_future", "batch", "length", "hidden_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.n_future >= args.length:
        parser.error(f"--n_future is {args.n_future}; it must be below --length {args.length}")
    if args.measure:
        print(json.dumps(measure_memory(args)))
        return 0

    shape = {name: getattr(args, name) for name in ("vocab", "n_future", "batch", "length", "hidden_size", "dtype")}
    case = f"v{args.vocab}_n{args.n_future}_b{args.batch}_s{args.length}_h{args.hidden_size}_{args.dtype}"
    path = Path(args.runs) / "benchmark" / f"{case}.json"
    env = environment() | {"mtp_sha256": library_sha256(), "threads": torch.get_num_threads()}
    record = {"schema": 1, "case": case, "shape": shape, "methods": {}, "unavailable": {}}
    if path.exists() and not args.force:
        known = json.loads(path.read_text())
        if known["env"]["mtp_sha256"] == env["mtp_sha256"]:
            record = known
    start = time.perf_counter()
    reasons = available()
    for method in args.methods:
        if reasons[method] is not None:
            if method not in record["methods"]:
                record["unavailable"][method] = reasons[method]
            continue
        record["unavailable"].pop(method, None)
        entry = record["methods"].setdefault(method, {})
        if args.part != "time" and "live_peak_bytes" not in entry:
            command = [sys.executable, str(HERE / "benchmark_mtp.py"), "--measure", method]
            command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
            result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | MALLOC)
            if result.returncode:
                print(f"benchmark_mtp.py: {method} did not run:\n{result.stderr[-2000:]}", file=sys.stderr)
                return 1
            entry |= json.loads(result.stdout.splitlines()[-1])
            peaks = [entry.get(name) for name in ("live_peak_bytes", "rss_rise_bytes")]
            words = ["-" if peak is None else f"{peak / 2**20:,.1f} MiB" for peak in peaks]
            print(f"{case} {method}: live {words[0]}, resident {words[1]} ({entry['counted_on']})", flush=True)
    if args.part != "memory" and args.rounds:
        logits = args.batch * args.length * args.n_future * args.vocab * (4 if args.dtype == "float32" else 2)
        too_large = FAKE if NAIVE_PEAK * logits > LARGEST_NAIVE_BYTES and not torch.cuda.is_available() else ()
        methods = [m for m in args.methods if reasons[m] is None and m not in too_large]
        methods = [m for m in methods if "time_s" not in record["methods"].get(m, {})]
        if methods:
            for method, times in measure_times(args, methods).items():
                record["methods"][method] |= times
                if times["time_s"]:
                    print(f"{case} {method}: {statistics.median(times['time_s']):.2f} s", flush=True)
    record |= {
        "command": ["python", "experiments/benchmark_mtp.py", *(argv or sys.argv[1:])],
        "env": env,
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_s": time.perf_counter() - start,
    }
    write_record(path, record)
    print(f"benchmark_mtp.py: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
