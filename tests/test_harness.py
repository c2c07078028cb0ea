"""The harness: settings, data, variants, what counts as done, and whole runs with their records."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import run_matrix
import torch
import train
import yaml
from conftest import ROOT

import data
import instrument
import rewards
import variants
from config import ExperimentConfig

CONFIGS = sorted((ROOT / "experiments/configs").glob("*.yaml"))
SMALL = ["--vocab_size=0", "--prompt_tokens=24", "--response_tokens=4", "--rloo_k=2", "--steps=2", "--head_dim=8"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_loads(path):
    settings = yaml.safe_load(path.read_text())
    config = ExperimentConfig(**settings)
    assert config.workload == path.stem, "records would be kept under another name"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rloo_k": 1}, "rloo_k is 1; the leave-one-out baseline needs at least 2"),
        ({"rloo_k": 4, "rows_per_micro_batch": 3}, "must divide the 4 rows"),
        ({"steps": 0}, "steps is 0"),
        ({"dtype": "float8"}, "known: float32"),
        ({"prompt_tokens_min": 600}, "outside 1 to 512"),
        ({"budget_gib": 0}, "must be positive"),
        ({"temperature": 0}, "must be positive"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**settings)


def test_a_setting_without_effect_warns():
    with pytest.warns(UserWarning, match="has no effect"):
        ExperimentConfig(dataset="x.jsonl", prompt_tokens_min=8)


@pytest.mark.parametrize("name", ["nonsense", "string-level@x", "baseline@"])
def test_unknown_variant(name):
    with pytest.raises(ValueError, match="unknown variant .*known: baseline"):
        variants.split_variant(name if name != "baseline@" else "base")


def test_variant_names_choose_trees():
    assert variants.split_variant("baseline") == ("v0.20.0", "0")
    assert variants.split_variant("string-level@3") == ("v0.20.0", "3")
    assert variants.split_variant("upstream-mb1") == ("v1.16.0", "0")
    assert ExperimentConfig(variant="upstream-mb1").rows_per_micro_batch == 1


def test_unknown_workload():
    with pytest.raises(ValueError, match="unknown workload 'x'; known: balanced, cpu"):
        run_matrix.workload_path("x")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "experiments")


def test_two_trees_do_not_mix():
    result = run_python(
        "import variants; variants.activate('baseline'); import trl; trl.RLOOTrainer\n"
        "try: variants.activate('upstream')\nexcept RuntimeError as e: print(e)"
    )
    assert "Two trees cannot be mixed" in result.stdout, result.stderr


def test_each_variant_imports_its_own_tree():
    for variant, version in (("baseline", "0.20.0"), ("upstream", "1.16.0")):
        result = run_python(f"import variants; s = variants.activate({variant!r}); import trl; print(trl.__version__)")
        assert result.stdout.strip() == version, result.stderr


# --- data ---


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(ExperimentConfig())


def test_built_in_prompts_have_exactly_the_tokens_asked_for(tokenizer):
    prompts = data.text_prompts(tokenizer, 5, 100, 100, seed=0)
    assert [len(tokenizer(p)["input_ids"]) for p in prompts] == [100] * 5 and len(set(prompts)) == 5
    lengths = [len(tokenizer(p)["input_ids"]) for p in data.text_prompts(tokenizer, 20, 8, 40, seed=1)]
    assert lengths[0] == 40 and min(lengths) >= 8 and len(set(lengths)) > 5


def test_built_in_prompts_survive_decoding(tokenizer):
    for prompt in data.text_prompts(tokenizer, 5, 200, 300, seed=2):
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_local_data_set_is_read_and_never_cut(tmp_path, tokenizer):
    long = "word " * 500
    config = ExperimentConfig(dataset=write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hello there"}, {"prompt": long}]))
    assert data.load_prompts(config, tokenizer) == ["Hello there", long]


def test_parquet_is_read(tmp_path, tokenizer):
    import pandas

    pandas.DataFrame({"prompt": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert data.load_prompts(ExperimentConfig(dataset=str(tmp_path / "a.parquet")), tokenizer) == ["one", "two"]


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([{"text": "x"}], {}, "has no column 'prompt'; it has \\['text'\\]"),
        ([{"prompt": "x"}, {"prompt": "  "}], {}, "prompt 1 of .* is empty"),
        ([{"prompt": "word " * 300}], {"max_position_embeddings": 128}, "exceeds the model's 128 positions"),
        ([{"prompt": "x"}], {"prompts_per_step": 2}, "1 prompts are fewer than prompts_per_step = 2"),
    ],
)
def test_bad_data_sets_end_in_a_sentence(tmp_path, tokenizer, rows, settings, message):
    config = ExperimentConfig(dataset=write_jsonl(tmp_path / "a.jsonl", rows), **settings)
    with pytest.raises(ValueError, match=message):
        data.load_prompts(config, tokenizer)


def test_missing_data_set(tokenizer):
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        data.load_prompts(ExperimentConfig(dataset="nowhere.jsonl"), tokenizer)


# --- rewards ---


@pytest.mark.parametrize(
    "values, message", [([1.0], "1 values for 2"), ([1.0, float("nan")], "nan"), ([1, "2"], "'2'")]
)
def test_bad_rewards_end_in_a_sentence(monkeypatch, values, message):
    monkeypatch.setattr(rewards, "broken", lambda completions: values, raising=False)
    with pytest.raises(ValueError, match=message):
        rewards.load_reward("broken")(["a", "b"])


def test_unknown_reward():
    with pytest.raises(ValueError, match="unknown reward 'nothing'"):
        rewards.load_reward("nothing")


def test_vowel_share():
    assert rewards.load_reward("vowel_share")(["aeiou", "abcd", ""]) == [1.0, 0.25, 0.0]


# --- what the model was given ---


def test_cut_and_mixed_prompts_are_found():
    a, b = list(range(100, 150)), list(range(200, 260))
    tiled = instrument.check_prompts([a, b, a, b], [a, b], rows_per_step=4, rloo_k=2, tiled=True)
    assert (tiled["prompts_changed"], tiled["groups_mixed"]) == (0, 0)
    blocked = instrument.check_prompts([a, a, b, b], [a, b], rows_per_step=4, rloo_k=2, tiled=False)
    assert (blocked["prompts_changed"], blocked["groups_mixed"]) == (0, 0)
    mixed = instrument.check_prompts([a, a, b, b], [a, b], rows_per_step=4, rloo_k=2, tiled=True)
    assert (mixed["prompts_changed"], mixed["groups_mixed"]) == (0, 2)
    cut = instrument.check_prompts([a[:20], b[-20:], a, [7]], [a, b], rows_per_step=4, rloo_k=2, tiled=True)
    assert cut["prompts_changed"] == 3
    assert cut["expected_prompt_tokens_per_row"] == [50, 60, 50, None]


# --- whole runs ---


def run_train(tmp_path, *options: str, name: str = "run") -> tuple[int, dict, str]:
    path = tmp_path / f"{name}.json"
    command = [sys.executable, str(ROOT / "experiments/train.py"), f"--record={path}", *SMALL, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, json.loads(path.read_text()) if path.exists() else {}, result.stderr


@pytest.mark.parametrize("variant", ["baseline", "string-level", "upstream"])
def test_a_run_leaves_a_whole_record(tmp_path, variant):
    code, record, stderr = run_train(tmp_path, f"--variant={variant}", "--prompts_per_step=2", "--prompt_tokens_min=9")
    assert (code, record["status"], record["error"]) == (0, "ok", None), stderr
    summary, tokens = record["summary"], record["tokens"]
    phases = {"generate", "score", "train_forward", "train_backward", "optimizer"}
    assert phases <= summary["live_peak_bytes_by_phase"].keys() and phases <= summary["phase_time_s"].keys()
    assert summary["live_peak_bytes"] == max(summary["live_peak_bytes_by_phase"].values())
    assert len(summary["step_time_s"]) == 2 and summary["cuda_peak_allocated_bytes"] is None
    assert tokens["completion_tokens_per_row"] == [4] * 4 and tokens["rows_per_step"] == 4
    assert tokens["prompt_tokens_per_row"] == tokens["expected_prompt_tokens_per_row"]
    assert len(set(tokens["prompt_tokens_per_row"])) == 2 and tokens["prompts_changed"] == 0
    assert record["env"]["tree"]["stage_name"] and record["env"]["tree"]["series_sha256"]
    assert record["config"]["variant"] == variant and summary["metrics"]


def test_settings_of_a_yaml_can_be_overridden(tmp_path):
    (tmp_path / "a.yaml").write_text("variant: string-level\nlearning_rate: 0.5\nsteps: 7\n")
    code, record, stderr = run_train(
        tmp_path, f"--config={tmp_path / 'a.yaml'}".replace("=", " ", 1).split()[0], str(tmp_path / "a.yaml")
    )
    assert code == 0, stderr
    assert (record["config"]["learning_rate"], record["config"]["steps"]) == (0.5, 2)
    assert record["env"]["tree"]["pin"] == "v0.20.0"


def test_out_of_memory_is_a_recorded_outcome(tmp_path):
    options = ["--vocab_size=151936", "--prompt_tokens=512", "--budget_gib=1.5"]
    code, record, _ = run_train(tmp_path, "--variant=baseline", *options)
    assert (code, record["status"]) == (3, "oom")
    assert "can't allocate memory" in record["error"] and record["summary"]["rss_peak_bytes"] < 2 * 2**30
    assert record["summary"]["step_time_median_s"] is None


def test_a_budget_smaller_than_the_model_is_an_error(tmp_path):
    code, record, _ = run_train(
        tmp_path, "--variant=baseline", "--hidden_size=512", "--vocab_size=151936", "--budget_gib=1"
    )
    assert (code, record["status"]) == (1, "error")
    assert "optimizer alone. Raise the budget" in record["error"]


def test_a_run_that_cuts_prompts_or_mixes_groups_fails(tmp_path):
    options = ["--prompt_tokens=1100", "--prompts_per_step=2", "--steps=1"]
    code, record, _ = run_train(tmp_path, "--variant=as-published", *options)
    assert (code, record["status"]) == (1, "error")
    assert "another prompt than the data set's" in record["error"] and "mixed prompts" in record["error"]
    assert record["tokens"]["prompts_changed"] == 4 and record["tokens"]["groups_mixed"] == 2
    assert record["tokens"]["prompt_tokens_per_row"] == [1024] * 4
    assert record["tokens"]["expected_prompt_tokens_per_row"] == [1100] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        (["--variant=x"], "unknown variant 'x'"),
        (["--rloo_k=1"], "needs at least 2 completions"),
        (["--rloo=8"], "--rloo=8"),
    ],
)
def test_bad_command_lines_end_in_a_sentence(tmp_path, options, message):
    code, record, stderr = run_train(tmp_path, *options)
    assert code == 2 and message in stderr and "Traceback" not in stderr and not record


@pytest.mark.parametrize("total_gib, workload", [(139.8, "published_32gb"), (23.6, "published"), (11.8, "cpu")])
def test_the_default_workload_is_one_that_the_card_holds(monkeypatch, total_gib, workload):
    card = SimpleNamespace(total_memory=int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert run_matrix.default_workload() == workload
    way_out = f"the device has {total_gib} GiB. Pass --budget_gib {0.95 * total_gib:.0f} "
    with pytest.raises(ValueError, match=way_out):
        train.limit_memory(200)


def test_finished_runs_are_skipped_and_others_are_made_again(tmp_path):
    commit = variants.tree_of("baseline").commit
    command = ["python", "experiments/train.py", "--variant", "baseline"]
    path = tmp_path / "a.json"
    record = {
        "status": "ok",
        "command": command,
        "config": {"steps": 3},
        "env": {"tree": {"commit": commit, "stage": "0"}},
        "summary": {},
    }

    def reason(**change):
        path.write_text(json.dumps(record | change))
        return run_matrix.unfinished_reason(path, command, {"steps": 3}, commit)

    assert run_matrix.unfinished_reason(path, command, {"steps": 3}, commit) == "missing"
    assert reason() is None and reason(status="oom") is None
    assert reason(status="timeout") == "ended as timeout"
    assert reason(command=[*command, "--seed", "5"]) == "its settings were others"
    assert reason(config={"steps": 4}) == "its settings were others", "the workload's file was edited"
    assert reason(config={"steps": 3, "temperature": 0.9}) == "its settings were others", "a default was changed"
    assert reason(config={"steps": 3, "variant": "baseline", "budget_gib": 4.0}) is None, "None may be filled in"
    assert reason(env={"tree": {"commit": "other", "stage": "0"}}) == "it was made with another fork tree"
    patched = {"tree": {"commit": commit, "stage": "5"}, "lowmem_sha256": "other"}
    assert reason(env=patched) == "lowmem has changed since"
    files = ["logprobs.py", "live_bytes.py"]
    assert reason(env=patched | {"lowmem_sha256": variants.lowmem_sha256(files)}) is None
    gone = {"lowmem_sha256": {"no_such_file.py": "0"}}
    assert reason(env=patched | gone) == "lowmem has changed since"
    assert reason(status="oom", config=None) is None, "ended by the kernel, without a record of its own"
    others = reason(status="oom", config=None, command=[*command, "--prompt_tokens", "8192"])
    assert others == "its settings were others"
    exhibit = {"tree": {"commit": commit, "stage": "as-published"}}
    assert reason(status="error", env=exhibit, summary={"step_time_s": [1.0]}) is None
    path.write_text('{"status": "ok", ')
    assert run_matrix.unfinished_reason(path, command, {"steps": 3}, commit) == "its record is half-written"


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    train.write_record(path, {"a": 1})
    with pytest.raises(TypeError):
        train.write_record(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.sh")) + sorted(ROOT.glob("experiments/run_*_rloo.sh")))
def test_every_script_explains_itself(script):
    result = subprocess.run([str(script), "-h"], capture_output=True, text=True)
    assert result.returncode == 0 and "Usage:" in result.stdout and "akes" in result.stdout


def test_the_matrix_resumes(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/run_matrix.py"), "--variants", "string-level", "--k", "2"]
    command += ["--workload", "learning", "--seeds", "0", "--runs", str(tmp_path), "--steps", "6"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0 and "string-level_k2_seed0: starting" in first.stdout, first.stdout + first.stderr
    record = json.loads((tmp_path / "learning/string-level_k2_seed0.json").read_text())
    assert record["monitor"]["samples"] > 3 and record["summary"]["rss_peak_bytes"] > 2e8
    timeline = (tmp_path / "learning/string-level_k2_seed0.timeline.csv").read_text()
    phases = {line.split(",")[5] for line in timeline.splitlines()[1:]} - {"", "other"}
    assert phases and phases <= set(instrument.PHASES)
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "string-level_k2_seed0: done before" in second.stdout
