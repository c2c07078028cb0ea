"""Peak memory and time of one multi-token-prediction loss with its backward, computed in every known way, in one run.

    python experiments/benchmark_mtp.py --vocab 151936 --n_future 4

Memory: each method in a fresh process, in bytes that PyTorch's allocator had given out above the inputs (the gradients
it returns included). What does not fit is counted in a dry run (fake tensors) and marked so.
Time: the methods in turn, round after round, in one process without a meter. Exactness: loss and gradients against the
naive ones of the same process. The record is results/runs/<set>/benchmark/<case>.json; what is done is skipped and
missing rounds are added, so it may be interrupted.

cut-cross-entropy is measured where it can be imported (with triton, which it imports even for its torch_compile; put
both on PYTHONPATH), Liger and cut-cross-entropy's own kernel where there is a GPU as well.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from train import environment, write_record  # noqa: E402

from lowmem.dry_run import DryRun  # noqa: E402
from lowmem.live_bytes import LiveBytes  # noqa: E402
from lowmem.mtp_backward import sequential_mtp_backward  # noqa: E402
from lowmem.mtp_logits import compute_mtp_ce_loss  # noqa: E402
from lowmem.mtp_loss import mtp_ce_loss  # noqa: E402
from lowmem.mtp_targets import shift_labels  # noqa: E402
from mtp_config import library_sha256  # noqa: E402
from run_outcome import OUT_OF_MEMORY  # noqa: E402

SMALL_TILE = (128, 512)  # 256 KiB in float32, for comparison with what holds no more than that
WHOLE_ROWS = (64, 256)  # at once on the whole vocabulary: 37 and 148 MiB of 151,936 in float32
NAIVE_PEAK = 3.6  # of the naive loss, in sizes of its logits (measured: 3.5 at 4 heads, more at 1)
LARGEST_NAIVE_BYTES = 9 * 2**30  # on a CPU; what needs more is counted on fake tensors
FAKE = ("naive", "seed-del", "logits")


def naive(hidden, weight, labels):
    logits = hidden @ weight.t()  # (B, S, n, V)
    total, n_future = 0.0, hidden.shape[2]
    for k in range(1, n_future + 1):
        ce = F.cross_entropy(logits[:, :-k, k - 1].reshape(-1, weight.shape[0]), labels[:, k:].reshape(-1))
        total = total + ce
    return total / n_future


def seed_del(hidden, weight, labels):
    """The widespread remedy: scalars summed up, and every name deleted after its head."""
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


def ours_whole_vocabulary(rows):
    """The driver, with heads that are given hidden states; `rows` at once, on the whole vocabulary."""

    def loss(hidden, weight, labels):
        heads = [lambda _, k=k: hidden[:, :, k] for k in range(hidden.shape[2])]
        tile = dict(chunk_tokens=rows, chunk_vocab=weight.shape[0])
        return sequential_mtp_backward(hidden.detach()[:, :, 0], heads, weight, labels, **tile)["weighted_ce_loss"]

    return loss


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


def torch_chunked(reduction, rows=None):
    """PyTorch's own, with its own choice of the chunk or that of the caller."""
    settings = {} if rows is None else dict(chunking_method=None, batch_chunk_size=rows)

    def one(hidden, weight, targets):
        options = torch.nn.LinearCrossEntropyOptions(**settings)
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
    "torch-chunked-64": per_head(torch_chunked("mean", rows=WHOLE_ROWS[0])),
    "torch-chunked-256": per_head(torch_chunked("mean", rows=WHOLE_ROWS[1])),
    "cce-compile": one_call(cut_cross_entropy("torch_compile")),
    "cce-kernel": one_call(cut_cross_entropy("cce")),
    "liger": per_head(liger),
    "logits": ours_from_logits,
    "hidden": ours,
    "hidden-small-tile": ours_small_tile,
    "whole-vocabulary": ours_whole_vocabulary(WHOLE_ROWS[0]),
    "whole-vocabulary-256": ours_whole_vocabulary(WHOLE_ROWS[1]),
}
SLOW = ("torch-chunked-mean", "torch-chunked-none")  # 2 to 12 times the naive time
PEERS = {"cce-compile": "cut_cross_entropy", "cce-kernel": "cut_cross_entropy", "liger": "liger_kernel"}


def available() -> dict[str, str | None]:
    """Every method, with the reason if it cannot run here."""
    reasons = dict.fromkeys(METHODS)
    if not torch.cuda.is_available():
        reasons |= dict.fromkeys(("cce-kernel", "liger"), "pending: needs a GPU")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunked = [method for method in METHODS if method.startswith("torch-chunked")]
        reasons |= dict.fromkeys(chunked, "needs torch >= 2.13")
    for method, package in PEERS.items():
        try:
            reasons[method] or importlib.import_module(package)
        except ImportError as error:
            reasons[method] = f"not installed: {error}"
    return reasons


def peer_versions() -> dict[str, str]:
    found = {}
    for name in ("cut-cross-entropy", "liger-kernel", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def inputs(args):
    torch.manual_seed(0)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (args.batch, args.length, args.n_future, args.hidden_size)
    hidden = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden_size, device=device) / args.hidden_size**0.5).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(0, args.vocab, (args.batch, args.length), device=device)


def does_not_fit(args, method: str) -> bool:
    logits = args.batch * args.length * args.n_future * args.vocab * (4 if args.dtype == "float32" else 2)
    return method in FAKE and NAIVE_PEAK * logits > LARGEST_NAIVE_BYTES and not torch.cuda.is_available()


def measure_memory(args) -> dict:
    """Of one method, in this process."""
    method = METHODS[args.measure]
    if does_not_fit(args, args.measure):
        with DryRun():
            tensors = inputs(args)
            meter = LiveBytes()
            meter.track(tensors)
            before = meter.live_bytes
            with meter:
                method(*tensors).backward()
            found = {"counted_on": "fake tensors", "peak_bytes": meter.peak_bytes - before}
    else:
        tensors = inputs(args)
        if args.measure == "cce-compile" or torch.cuda.is_available():
            gradients_of(method, tensors)  # compiles; on a GPU makes the workspaces of its libraries
            tensors[0].grad = tensors[1].grad = None  # which the peak is to contain
        found = {"counted_on": "allocator", "peak_bytes": count_allocated(lambda: gradients_of(method, tensors))}
    found["returned_gradient_bytes"] = sum(x.numel() * x.element_size() for x in tensors[:2])
    return found


def gradients_of(method, tensors) -> torch.Tensor:
    """The loss, detached; its gradients are in `.grad` of hidden states and weight."""
    hidden, weight, _ = tensors
    hidden.grad = weight.grad = None
    loss = method(*tensors)
    if loss.requires_grad:  # the driver has done its backward
        loss.backward()
    return loss.detach()


def count_allocated(work) -> int:
    """Peak of the bytes that PyTorch's allocator gives out in `work()`, inside operators too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def measure_times(args, methods: list[str], record: dict, keep) -> None:
    """Adds rounds to `record`, and of every method its distance from the naive loss and gradients; calls `keep()`.

    A round is the seconds of one run of each method, one after the other; `naive` is in every round where it fits.
    Every method runs once before, on few tokens.
    """
    tensors = inputs(args)
    hidden, weight, _ = tensors
    reference = None
    rounds, entries = record["rounds"], record["methods"]
    wanted = {m: args.slow_rounds if m in SLOW else args.rounds for m in methods if m != "naive"}
    missing = {m: count - sum(m in done for done in rounds) for m, count in wanted.items()}
    if max(missing.values(), default=0) > 0:
        few = inputs(argparse.Namespace(**(vars(args) | {"batch": 1, "length": args.n_future + 1, "vocab": 512})))
        for method in methods:  # imports, and on a GPU kernels; what is compiled is compiled for these shapes
            gradients_of(METHODS[method], tensors if method == "cce-compile" else few)
    for number in range(max(missing.values(), default=0)):
        done = {}
        for method in methods:
            if method != "naive" and missing[method] <= number:
                continue
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = gradients_of(METHODS[method], tensors)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            done[method] = time.perf_counter() - start
            if method == "naive" and reference is None:
                reference = loss, hidden.grad.clone(), weight.grad.clone()
            elif reference and "gradient_difference_relative" not in entries[method]:
                distances = (
                    (a - b).abs().max().item() / b.abs().max().item()
                    for a, b in zip((hidden.grad, weight.grad), reference[1:])
                )
                entries[method]["gradient_difference_relative"] = max(distances)
                entries[method]["loss_difference"] = (loss - reference[0]).abs().item()
        rounds.append(done)
        keep()


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
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
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
    env = environment() | {
        "mtp_sha256": library_sha256(),
        "threads": torch.get_num_threads(),
        "peers": peer_versions(),
    }
    record = {"schema": 2, "case": case, "shape": shape, "methods": {}, "rounds": [], "unavailable": {}, "calls": []}
    if path.exists() and not args.force:
        known = json.loads(path.read_text())
        if all(known["env"][name] == env[name] for name in ("mtp_sha256", "threads", "device", "torch")):
            record = known
            env["peers"] = known["env"]["peers"] | env["peers"]
    start = time.perf_counter()
    call = {"command": ["python", "experiments/benchmark_mtp.py", *(argv or sys.argv[1:])]}
    call |= {name: env[name] for name in ("repo_commit", "repo_dirty")}

    def keep() -> None:  # after every measurement: what is interrupted goes on from there
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        call.update(measured_at=now, wall_s=time.perf_counter() - start)
        if record["calls"][-1:] != [call]:
            record["calls"].append(call)
        record.update(env=env, measured_at=now)
        write_record(path, record)

    reasons = available()
    unavailable = {method: why for method, why in reasons.items() if why and method not in record["methods"]}
    if unavailable != record["unavailable"]:
        record["unavailable"] = unavailable
        keep()
    for method in args.methods:
        if reasons[method] is not None:
            continue
        entry = record["methods"].setdefault(method, {})
        if args.part == "time" or "peak_bytes" in entry:
            continue
        command = [sys.executable, str(HERE / "benchmark_mtp.py"), "--measure", method]
        command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        result = subprocess.run(command, capture_output=True, text=True)
        if OUT_OF_MEMORY.search(result.stderr):
            entry |= {"out_of_memory": True, "peak_bytes": None}
            print(f"{case} {method}: out of memory", flush=True)
        elif result.returncode:
            print(f"benchmark_mtp.py: {method} did not run:\n{result.stderr[-2000:]}", file=sys.stderr)
            return 1
        else:
            entry |= json.loads(result.stdout.splitlines()[-1])
            print(f"{case} {method}: {entry['peak_bytes'] / 2**20:,.1f} MiB ({entry['counted_on']})", flush=True)
        keep()
    if args.part != "memory":
        methods = [m for m in args.methods if reasons[m] is None and not does_not_fit(args, m)]
        methods = [m for m in methods if not record["methods"][m].get("out_of_memory")]
        measure_times(args, methods, record, keep)
        for method in methods:
            seconds = [done[method] for done in record["rounds"] if method in done]
            if seconds:
                print(f"{case} {method}: {statistics.median(seconds):.2f} s, n = {len(seconds)}", flush=True)
    print(f"benchmark_mtp.py: {path}" + ("" if "wall_s" in call else ": done before"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
