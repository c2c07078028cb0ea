"""Rows of prompt and completion as batches of token ids; made here, or from a file or the hub."""

import random
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from data import default_tokenizer_folder
from mtp_tasks import make_rows

COLUMNS = ("prompt", "completion", "reward")


def load_rows(config) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows) of prompt, completion and, where there is one, reward.

    Raises:
        ValueError: for a data set without the columns that the pipeline needs, or with too few rows.
    """
    if config.dataset is None:
        training = make_rows(config.rows, config.wrong_share, config.seed)
        return training, make_rows(config.validation_rows, config.wrong_share, config.seed + 10**6)
    suffix = Path(config.dataset).suffix
    if suffix in (".json", ".jsonl", ".parquet"):
        if not Path(config.dataset).exists():
            raise ValueError(f"the data set {config.dataset} does not exist")
        table = load_dataset("parquet" if suffix == ".parquet" else "json", data_files=config.dataset, split="train")
    else:
        table = load_dataset(config.dataset, split=config.dataset_split)
    needed = COLUMNS if config.pipeline != "baseline" else COLUMNS[:2]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(f"the data set {config.dataset} has no column {missing}; pipeline {config.pipeline} needs it")
    rows = [{name: row.get(name, 1.0) for name in COLUMNS} for row in table]
    if len(rows) < config.batch_size + config.validation_rows:
        raise ValueError(
            f"the data set {config.dataset} has {len(rows)} rows; batch_size {config.batch_size} and validation_rows "
            f"{config.validation_rows} need {config.batch_size + config.validation_rows}"
        )
    return rows[: -config.validation_rows], rows[-config.validation_rows :]


def load_mtp_tokenizer(config):
    return AutoTokenizer.from_pretrained(config.tokenizer or default_tokenizer_folder(config.tokenizer_vocab_size))


def encode(rows: list[dict], tokenizer, max_tokens: int) -> list[dict]:
    """Adds `ids` and `prompt_tokens` to every row. Raises ValueError for an empty completion or too long a row."""
    encoded = []
    for number, row in enumerate(rows):
        prompt, completion = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in COLUMNS[:2])
        ids = prompt + completion + [tokenizer.eos_token_id]
        if not completion:
            raise ValueError(f"row {number} has an empty completion; remove it from the data set")
        if len(ids) > max_tokens:
            raise ValueError(
                f"row {number} has {len(ids)} tokens, more than max_tokens = {max_tokens}; it is never cut"
            )
        encoded.append(row | {"ids": ids, "prompt_tokens": len(prompt)})
    return encoded


def collate(rows: list[dict], pad_token_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` (B, S), -100 in prompt and padding, and `rewards` (B,)."""
    length = length or max(len(row["ids"]) for row in rows)
    batch = {
        name: torch.full((len(rows), length), fill) for name, fill in (("input_ids", pad_token_id), ("labels", -100))
    }
    batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids = torch.tensor(row["ids"])
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, row["prompt_tokens"] : len(ids)] = ids[row["prompt_tokens"] :]
    return batch | {"rewards": torch.tensor([row["reward"] for row in rows], dtype=torch.float32)}


def batches(rows: list[dict], size: int, steps: int, pad_token_id: int, seed: int):
    """`steps` batches of `size` rows, epoch after epoch in shuffled order."""
    rng, order = random.Random(seed), []
    for _ in range(steps):
        if len(order) < size:
            order = rng.sample(range(len(rows)), len(rows))
        yield collate([rows[order.pop()] for _ in range(size)], pad_token_id)
