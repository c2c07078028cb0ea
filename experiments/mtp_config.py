"""The settings of one multi-token-prediction run, from YAML (`--config`) and the command line. One flat dataclass."""

import hashlib
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

import yaml
from transformers import HfArgumentParser

LIBRARY = ("chunked_cross_entropy", "mtp_targets", "mtp_loss", "mtp_logits", "mtp_backward")  # modules of lowmem/
PIPELINES = ("baseline", "verifiable", "rho1")
LOSSES = ("naive", "logits", "hidden", "sequential")


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class MtpConfig:
    pipeline: str = _setting(
        "baseline", "baseline: no weights; verifiable: TD weights of tokens; rho1: per-head choice"
    )
    loss: str = _setting("hidden", "naive, logits, hidden or sequential: how the same loss is computed (docs/mtp.md)")
    workload: str = _setting("learning", "name of the workload; results are kept under it")
    record: Optional[str] = _setting(
        None, "path of the JSON record; default results/runs/local/mtp/<workload>/<run>.json"
    )

    n_future: int = _setting(4, "heads; head k predicts the k-th token after a position")
    vocab_size: int = _setting(0, "vocabulary of the model; 0 = as many as its tokenizer has")
    tokenizer_vocab_size: int = _setting(320, "tokens of the built-in tokenizer, at least 258")
    hidden_size: int = _setting(64, "of trunk, heads and critic")
    intermediate_size: int = _setting(128, "of trunk, heads and critic")
    num_hidden_layers: int = _setting(2, "of trunk and critic")
    num_attention_heads: int = _setting(4, "of trunk and critic")
    tie_word_embeddings: bool = _setting(False, "the LM head is the embedding")
    dtype: str = _setting("float32", "float32, bfloat16 or float64: type of the weights")

    tokenizer: Optional[str] = _setting(None, "hub name or folder; default: built in")
    dataset: Optional[str] = _setting(
        None,
        "hub name or .json(l)/.parquet with columns prompt, completion and, but for baseline, reward; default: made",
    )
    dataset_split: str = _setting("train", "split of a hub data set; its last validation_rows rows are held out")
    rows: int = _setting(4000, "rows that are made for training")
    wrong_share: float = _setting(0.3, "share of the made rows whose completion was altered")
    validation_rows: int = _setting(128, "rows for validation; only those of reward 1 count")
    max_tokens: int = _setting(48, "longest row; a longer one is an error")

    batch_size: int = _setting(32, "rows per step")
    steps: int = _setting(300, "optimizer steps")
    learning_rate: float = _setting(3e-3, "of AdamW, constant")
    validate_every: int = _setting(
        50, "steps between validations, and one before the first and after the last; more than steps: none"
    )
    seed: int = _setting(0, "of weights, data and order")

    critic_steps: int = _setting(200, "verifiable: steps that the critic is trained before")
    td_beta: float = _setting(0.5, "verifiable: weights are exp(td_beta * standardised temporal difference)")
    td_weight_min: float = _setting(0.2, "verifiable: smallest weight")
    td_weight_max: float = _setting(3.0, "verifiable: largest weight")
    reference_steps: int = _setting(200, "rho1: steps that the reference is trained before, on rows of reward 1")
    rho1_top_share: float = _setting(0.6, "rho1: share of each head's predictions that is learned from")

    chunk_tokens: int = _setting(512, "hidden, sequential: tokens projected at once")
    chunk_vocab: int = _setting(4096, "hidden, sequential: vocabulary entries projected at once")
    budget_gib: Optional[float] = _setting(None, "memory that the run may use, GiB; an out-of-memory is recorded")
    count_live_bytes: bool = _setting(True, "count live tensor bytes (a little slower); false for timing")

    def __post_init__(self):
        for name, known in (
            ("pipeline", PIPELINES),
            ("loss", LOSSES),
            ("dtype", ("float32", "bfloat16", "float64")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        positive = ("n_future", "rows", "validation_rows", "max_tokens", "batch_size", "steps", "validate_every")
        for name in (*positive, "critic_steps", "reference_steps", "chunk_tokens", "chunk_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.rho1_top_share <= 1:
            raise ValueError(f"rho1_top_share is {self.rho1_top_share}; it must be above 0 and at most 1")
        if not 0 <= self.wrong_share < 1:
            raise ValueError(f"wrong_share is {self.wrong_share}; it must be at least 0 and below 1")
        if not 0 <= self.td_weight_min <= self.td_weight_max:
            raise ValueError(
                f"td_weight_min is {self.td_weight_min}, td_weight_max {self.td_weight_max}; out of order"
            )
        if self.batch_size > self.rows and self.dataset is None:
            raise ValueError(f"batch_size is {self.batch_size}, more than the {self.rows} rows")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of 2 x num_attention_heads "
                f"({2 * self.num_attention_heads})"
            )
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be positive")
        if self.loss in ("naive", "logits") and (self.chunk_tokens, self.chunk_vocab) != (512, 4096):
            warnings.warn(f"chunk_tokens and chunk_vocab have no effect with loss: {self.loss}", stacklevel=2)

    @property
    def run_name(self) -> str:
        return f"{self.pipeline}_{self.loss}_b{self.batch_size}_n{self.n_future}_seed{self.seed}"


def library_sha256() -> str:
    """One hash of the modules that decide memory and time of these runs."""
    digest = hashlib.sha256()
    for name in LIBRARY:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent.parent / f"lowmem/{name}.py").read_bytes())
    return digest.hexdigest()


def parse_config(argv: list[str]) -> MtpConfig:
    """The settings of `--config FILE.yaml`, overridden by the other options.

    Raises:
        ValueError: for unknown keys of the file and for values that are refused.
    """
    parser = HfArgumentParser(MtpConfig, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings")
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        try:
            settings = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        unknown = set(settings) - {f.name for f in fields(MtpConfig)}
        if unknown:
            raise ValueError(f"{path} has unknown settings: {', '.join(sorted(unknown))}")
        parser.set_defaults(**settings)
    values = vars(parser.parse_args(argv))
    values.pop("config")
    return MtpConfig(**values)
