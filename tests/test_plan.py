"""The planner: its predictions against executed steps, its verdicts, its search, and what it says to bad input."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from lowmem.devices import device_bytes
from lowmem.dry_run import DryRun, KernelWithoutFake
from lowmem.live_bytes import LiveBytes
from lowmem.plan import can_be_written, main, plan_of, sharded, training_yaml
from lowmem.plan import parser as plan_parser
from lowmem.plan_config import PlanConfig, changed, from_training_file
from lowmem.plan_cuda import like_cuda
from lowmem.plan_host import host_memory, memory_limit
from lowmem.plan_memory import MemoryTrace
from lowmem.plan_models import KNOWN_SHAPES, build_model, load_config
from lowmem.plan_search import maximize, possible_fixes, ranked_fixes, recommend
from lowmem.plan_step import execute, model_config, simulate
from lowmem.plan_verdict import (
    CPU,
    CUDA,
    FITS,
    NO,
    TIGHT,
    Readings,
    calibrate,
    device_needed,
    judge,
    largest_peak,
    load_calibration,
)

TINY = {
    "num_hidden_layers": 1,
    "vocab_size": 2000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "prompt_tokens": 40,
}
TINY |= {"response_tokens": 8, "rloo_k": 4}


def peaks(step):
    return {phase: sum(categories.values()) for phase, categories in step.by_phase.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"lm_head": "completion", "rows_per_micro_batch": 2},
        {"lm_head": "chunked", "gradient_checkpointing": True, "dtype": "bfloat16"},
        {"shared_prefix": True, "lm_head": "completion", "rows_per_micro_batch": 2, "prompts_per_step": 2},
        {"method": "grpo", "lora_rank": 2, "attention": "eager"},
        {"method": "ppo", "prompts_per_step": 4, "rows_per_micro_batch": 2},
        {"method": "sft", "prompts_per_step": 3, "prompt_tokens_min": 10, "optimizer": "adamw_foreach"},
        {"method": "mtp", "prompts_per_step": 2, "num_future_tokens": 3, "optimizer": "adafactor"},
        {"selective_checkpointing": True, "gradient_checkpointing_ratio": 0.5, "num_hidden_layers": 3},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_simulated_training_peaks_equal_executed_ones(settings):
    plan = PlanConfig(**TINY | settings)
    simulated, executed = simulate(plan), execute(plan)
    ours, real = peaks(simulated), peaks(executed)
    for phase in ("train_forward", "train_backward", "optimizer"):
        assert ours[phase] == real[phase]
    if "generate" in real:  # a few small integer tensors of `generate`
        assert ours["generate"] == pytest.approx(real["generate"], rel=0.015)
        assert ours["score"] == pytest.approx(real["score"], rel=0.01)
    assert simulated.peak_bytes == pytest.approx(executed.peak_bytes, rel=0.02)
    assert simulated.train_flops == executed.train_flops
    assert sum(simulated.by_phase[simulated.peak_phase].values()) == simulated.peak_bytes


def test_a_simulation_that_forgets_the_reference_model_is_found():
    plan = PlanConfig(**TINY)
    without = simulate(changed(plan, kl_coef=0.0))
    assert abs(without.peak_bytes / execute(plan).peak_bytes - 1) > 0.05


def test_encoder_decoder_matches_its_execution(tmp_path):
    shape = {
        "model_type": "mt5",
        "vocab_size": 500,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape | {"decoder_start_token_id": 0}))
    plan = PlanConfig(model=str(tmp_path), method="sft", prompt_tokens=24, response_tokens=12, prompts_per_step=3)
    assert peaks(simulate(plan)) == peaks(execute(plan))
    with pytest.raises(ValueError, match="mt5 can be planned with sft"):
        simulate(changed(plan, method="rloo"))


def test_kernels_of_cuda_save_a_boolean_dropout_mask(tmp_path):
    shape = {
        "model_type": "t5",
        "vocab_size": 500,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape | {"decoder_start_token_id": 0}))
    plan = PlanConfig(model=str(tmp_path), method="sft", prompt_tokens=64, response_tokens=32, prompts_per_step=8)
    assert simulate(plan, cuda=True).peak_bytes < 0.9 * simulate(plan).peak_bytes


def test_grouped_heads_in_float32_have_no_fused_kernel_on_cuda():
    def kept(dtype):
        query, key, value = (torch.rand(1, heads, 256, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
        with LiveBytes() as meter:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return meter.live_bytes, out.shape

    with DryRun(), like_cuda():
        in_float32, in_bfloat16 = kept(torch.float32), kept(torch.bfloat16)
    assert in_float32[1] == in_bfloat16[1] == (1, 4, 256, 16)
    assert in_float32[0] > 4 * 256 * 256 * 4 > 8 * in_bfloat16[0]


@pytest.mark.parametrize(
    "name, millions",
    [("qwen3-0.6b", 596), ("Qwen3-8B", 8191), ("tinyllama", 1100), ("t5-small", 60.5), ("t5-large", 738)],
)
def test_known_shapes_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = build_model(load_config(name), torch.bfloat16, initialise=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_known_shape_builds_a_config():
    assert all(load_config(name).model_type for name in KNOWN_SHAPES)


def test_dry_run_counts_what_a_real_run_counts_and_keeps_integers_real():
    def step():
        layer = torch.nn.Linear(64, 32)
        with LiveBytes() as meter:
            ids = torch.arange(12).view(3, 4)
            assert ids.sum().item() == 66 and bool((ids > 3).any())
            loss = layer(torch.rand(128, 64)).relu()[torch.tensor([True, False] * 64)].sum()
            loss.backward()
        return meter.peak_bytes, layer.weight.grad.shape

    with DryRun():
        dry = step()
    assert dry == step()


def test_dry_run_returns_the_shapes_strides_and_storages_of_real_operators():
    def outputs():
        x, y = torch.rand(4, 6), torch.rand(6, 5)
        made = [x @ y, x.t(), x.t()[1:, ::2], x.add_(1), x.expand(3, 4, 6), *x.split(3, 1), x.view(torch.int32)]
        made += [
            *x.max(1),
            *torch.linalg.qr(x),
            torch.cat([x, x.t().reshape(4, 6)]),
            x.to(torch.bfloat16),
            x.new_zeros(2),
        ]
        made += [*torch._foreach_mul([x, y], 2.0), x[torch.tensor([0, 2])], x.softmax(-1), x.sum(), x.unsqueeze_(0)]
        made += [torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])]
        same = [tensor.untyped_storage()._cdata == x.untyped_storage()._cdata for tensor in made]
        sizes = [tensor.untyped_storage().nbytes() for tensor in made]
        return same, sizes, [(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype) for tensor in made]

    with DryRun():
        first, again = outputs(), outputs()  # the second time from what is known
        with DryRun():
            nested = outputs()
        assert torch.rand(2, 3).tolist() == [[0.0] * 3] * 2
    assert first == again == nested == outputs()


def test_a_kernel_without_a_fake_is_named():
    library = torch.library.Library("plan_test", "DEF")  # noqa: TOR901
    library.define("secret(Tensor x) -> Tensor")
    library.impl("secret", lambda x: x.clone(), "CPU")
    with DryRun(), pytest.raises(KernelWithoutFake, match="plan_test.secret.*its memory is not known"):
        torch.ops.plan_test.secret(torch.rand(3))


def test_categories_add_up_and_know_the_logits():
    trace = MemoryTrace(vocab_size=100)
    with trace:
        trace.phase = "train_forward"
        kept = torch.zeros(10, 100), torch.zeros(10, 7)
        assert trace.categories["logits"] == 4000 and trace.categories["activations"] == 280
        del kept
    assert sum(trace.categories.values()) == trace.live_bytes == 0
    assert trace.peak_categories == {"logits": 4000, "activations": 280}


def test_verdicts_turn_at_their_limits():
    peak = 10 * 2**30
    exactly = device_needed(peak, CUDA)
    assert judge(peak, exactly, CUDA).verdict == FITS
    assert judge(peak, int(exactly * 0.95), CUDA).verdict == TIGHT
    assert judge(peak, int(exactly * 0.85), CUDA).verdict == NO
    assert judge(largest_peak(exactly, CPU), exactly, CPU).margin_bytes in (0, 1)


def test_devices_are_found_by_name_and_size():
    assert device_bytes("RTX 3090") == device_bytes("rtx3090") == device_bytes("24GiB") == 24 * 2**30
    assert device_bytes("800MiB") == 800 * 2**20
    names = {"NVIDIA GeForce RTX 4090": 24, "NVIDIA A100-SXM4-80GB": 80, "NVIDIA A100-PCIE-40GB": 40, "Tesla T4": 15}
    names |= {"NVIDIA H100 80GB HBM3": 80, "NVIDIA L4": 22.5, "RTX 5090": 32, "H200": 131, "A100": 80}
    assert {name: device_bytes(name) / 2**30 for name in names} == names
    for bad in ("0", "0GiB", "-3", "RTX 9999", "nan"):
        with pytest.raises(ValueError, match="give"):
            device_bytes(bad)


def test_maximize_finds_the_last_k_that_fits():
    plan = PlanConfig(**TINY, lm_head="completion")

    def run(other):
        return simulate(other)

    device = device_needed(run(changed(plan, rloo_k=7)).peak_bytes, CPU)
    largest, step = maximize(plan, "k", device, CPU, run)
    assert largest == 7 and judge(step.peak_bytes, device, CPU).verdict == FITS
    assert judge(run(changed(plan, rloo_k=8)).peak_bytes, device, CPU).verdict != FITS
    assert maximize(plan, "k", 2**20, CPU, run) is None


def test_maximize_finds_the_last_length_that_fits():
    plan = PlanConfig(**TINY, lm_head="completion", max_position_embeddings=400)
    device = device_needed(simulate(changed(plan, response_tokens=150)).peak_bytes, CPU)
    sizes = []

    def run(other):
        sizes.append(other.response_tokens)
        return simulate(other)

    largest, step = maximize(plan, "length", device, CPU, run)
    assert step.peak_bytes == simulate(changed(plan, response_tokens=largest)).peak_bytes
    assert judge(step.needed_bytes, device, CPU).verdict == FITS
    assert judge(simulate(changed(plan, response_tokens=largest + 1)).needed_bytes, device, CPU).verdict != FITS
    assert len(sizes) <= 6  # two ends of the line, its guess, its neighbour: not one after the other
    whole, _ = maximize(plan, "length", 2**40, CPU, run)
    assert whole == 400 - plan.prompt_tokens  # the model's positions


def test_strategies_of_the_memory_section_are_predicted_and_chosen():
    from lowmem.memory_strategy import MemorySettings, choose_memory_strategy
    from lowmem.plan_strategies import peak_under

    plan = PlanConfig(**TINY | {"num_hidden_layers": 4, "intermediate_size": 512, "lm_head": "chunked"})
    predict = peak_under(plan)
    none, full = MemorySettings(), MemorySettings(gradient_checkpointing_ratio=1.0)
    selective = MemorySettings(selective_checkpointing=True)
    assert predict(full) < predict(selective) < predict(none) == simulate(plan).peak_bytes
    assert predict(selective) == execute(changed(plan, selective_checkpointing=True)).peak_bytes
    given = MemorySettings(auto_memory_strategy=True)
    for budget, chosen in ((predict(none), (0.0, False)), (predict(selective), (1.0, True))):
        settings = choose_memory_strategy(given, 1, 48, budget_bytes=budget, predict=predict).settings
        assert (settings.gradient_checkpointing_ratio, settings.selective_checkpointing) == chosen
    two = peak_under(plan, 2, cuda=True)
    sharded, offloaded = (MemorySettings(zero2_gradient_sharding=True, grad_offload=off) for off in (False, True))
    assert two(offloaded) < two(sharded)


def test_calibration_takes_its_figures_from_the_device(tmp_path):
    plan = PlanConfig(**TINY)

    def readings():  # as `cuda_readings`, with the meter of the CPU
        peak = execute(plan).peak_bytes
        return Readings("a card", int(23.5 * 2**30), 22 * 2**30, 2**30, int(1.1 * peak), simulate(plan).peak_bytes)

    unseen = calibrate(tmp_path / "card.json", readings)
    assert unseen == load_calibration(tmp_path / "card.json")
    assert unseen.fixed_bytes == 2**29 and unseen.total_fraction == pytest.approx(0.5 / 24)
    assert unseen.fraction == pytest.approx(0.1, abs=0.01) and "a card" in unseen.source
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            calibrate(tmp_path / "none.json")


def test_the_cuda_validation_lists_and_measures_its_cases():
    import validate_planner_cuda as cuda

    cases = cuda.cases()
    assert len(cases) >= 17 and all(PlanConfig(**settings) for settings in cases.values())
    row = cuda.measure(TINY | {"lm_head": "completion"}, device="cpu")
    assert row["status"] == "ok" and row["allocated_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.02)
    assert "1 executed" in cuda.report({"tiny": row | {"reserved_bytes": row["allocated_bytes"]}})


def test_fixes_are_simulated_and_ranked(monkeypatch):
    plan = PlanConfig(**TINY)
    step = simulate(plan)
    possible = [fix for fix in possible_fixes(plan) if "chunk" in fix[0] or "micro" in fix[0]]
    monkeypatch.setattr("lowmem.plan_search.possible_fixes", lambda plan: possible)
    fixes, _ = ranked_fixes(plan, step, simulate)
    saved = [fix.saved_bytes for fix in fixes]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0
    chosen = next(fix for fix in fixes if fix.name == "chunked log-probabilities")
    assert step.peak_bytes - simulate(changed(plan, **chosen.changes)).peak_bytes == chosen.saved_bytes


@pytest.mark.slow
def test_recommendation_fits_and_is_taken_by_train(tmp_path):
    from config import ExperimentConfig

    plan = PlanConfig(**TINY | {"rloo_k": 8, "vocab_size": 20_000})
    device = device_needed(simulate(changed(plan, lm_head="chunked", rows_per_micro_batch=1)).peak_bytes, CPU) + 2**18
    best = recommend(plan, device, CPU, simulate, cuda=False, allowed=can_be_written)
    assert judge(execute(best.plan).peak_bytes, device, CPU).verdict == FITS
    assert judge(simulate(plan).peak_bytes, device, CPU).verdict != FITS
    settings = training_yaml(best.plan)
    assert ExperimentConfig(**settings).rows_per_step == plan.rows_per_step


def test_host_memory_knows_workers_and_the_control_group(tmp_path):
    group = tmp_path / "job"
    group.mkdir()
    (tmp_path / "memory.max").write_text("max\n")
    (group / "memory.max").write_text("123456\n")
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    assert memory_limit(tmp_path, own) == (123456, str(group / "memory.max"))
    none = host_memory(10, 4, 100, 2, measured=(1000, 50))
    many = host_memory(10, 4, 100, 2, workers=8, offload_optimizer=True, measured=(1000, 50))
    assert many.peak_bytes - none.peak_bytes == 8 * 50 + 100 * 14


def test_every_setting_of_train_is_known():
    from config import ExperimentConfig

    settings = {field.name: field.default for field in dataclasses.fields(ExperimentConfig)}
    from_training_file(settings | {"variant": None})


def test_training_files_are_read_and_unknown_settings_named():
    plan = PlanConfig(**from_training_file({"workload": "cpu", "rloo_k": 8, "response_tokens": 9, "steps": 3}))
    assert plan.rloo_k == 8 and plan.response_tokens == 9
    with pytest.raises(ValueError, match="rloo_kk"):
        from_training_file({"rloo_kk": 8})
    with pytest.raises(ValueError, match="plan_trainer.py"):
        from_training_file({"variant": "baseline"})
    strategies = {"selective_checkpointing": True, "oom_recovery": True, "grad_offload": False}
    plan = PlanConfig(**from_training_file({"memory": strategies, "attn_implementation": "sdpa"}))
    assert plan.selective_checkpointing and not plan.offload_optimizer
    with pytest.raises(ValueError, match="sequence_parallelism, which is not simulated"):
        from_training_file({"memory": {"sequence_parallelism": 2}})
    assert from_training_file({"attn_implementation": "flash_attention_2"}) == {"attention": "sdpa"}
    with pytest.raises(ValueError, match="sparse.*not simulated"):
        from_training_file({"attn_implementation": "sparse"})


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "no/such-model-here"], "neither a folder"),
        (["--method", "dpo"], "expected one of rloo"),
        (["--device", "0GiB"], "has no memory"),
        (["--rloo_k", "1"], "at least 2 completions"),
        (["--shared_prefix", "--method", "sft"], "contradicts"),
        (["--ranks", "2"], "contradicts"),
        (["--offload_optimizer", "--optimizer", "sgd"], "contradicts"),
        (["--rows_per_micro_batch", "3"], "must divide"),
        (["--prompt_tokens", "50000"], "exceed the model's"),
        (["--gradient_checkpointing_ratio", "1.5"], "expected a share"),
        (["--selective_checkpointing", "--attention", "eager"], "contradicts"),
        (["--maximize", "k"], "need a --device"),
        (["--device", "8", "--maximize", "k", "--recommend"], "contradicts"),
        (["--device", "8", "--maximize", "depth"], "cannot be maximized"),
        (["--config", "no-such.yaml"], "cannot be read"),
        (["--calibration", "no-such.json"], "is no calibration"),
        (["--num_attention_heads", "3", "--num_key_value_heads", "2"], "no multiple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence(options, said, capsys, monkeypatch):
    def no_hub(name):
        raise OSError("there is no hub here")

    monkeypatch.setattr("lowmem.plan_models.AutoConfig.from_pretrained", no_hub)
    assert main(options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lowmem.plan: ") and said in error and error.count("\n") == 0


def test_configs_that_cannot_be_built_are_told(tmp_path):
    cases = {
        "[]": "model_type",
        '{"model_type": "qwen99"}': "knows no model type 'qwen99'",
        "{": "no config can be read",
    }
    for text, said in cases.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            model_config(PlanConfig(model=str(tmp_path)))


@pytest.fixture
def host_is_known(monkeypatch):
    monkeypatch.setattr("lowmem.plan_host.measure_process", lambda: (4 * 10**8, 10**7))


def test_command_line_writes_json_chart_and_yaml(tmp_path, capsys, host_is_known):
    options = [f"--{key}={value}" for key, value in TINY.items()] + ["--cpu", "--device=1GiB", "--lm_head=chunked"]
    files = {name: tmp_path / name for name in ("plan.json", "step.png", "run.yaml")}
    code = main(
        [
            *options,
            "--json",
            str(files["plan.json"]),
            "--chart",
            str(files["step.png"]),
            "--write",
            str(files["run.yaml"]),
        ]
    )
    text = capsys.readouterr().out
    assert code == 0 and "verdict: fits" in text and "<- peak" in text and "host limit" in text
    plan = json.loads(files["plan.json"].read_text())
    assert plan["peak_bytes"] == sum(plan["bytes_by_phase"][plan["peak_phase"]].values())
    assert files["step.png"].stat().st_size > 10_000
    assert plan_of(plan_parser().parse_args(options)).lm_head == "chunked"
    assert "variant: string-level" in files["run.yaml"].read_text()


def test_sharding_divides_states():
    plan = PlanConfig(**TINY)
    before = simulate(plan)
    states = before.by_phase["optimizer"]
    after = sharded(simulate(plan), changed(plan, ranks=4, shard="gradients"))
    assert after.by_phase["optimizer"]["weights"] == states["weights"]
    assert after.by_phase["optimizer"]["optimizer"] == -(-states["optimizer"] // 4)
    assert after.peak_bytes == max(peaks(after).values()) < before.peak_bytes
