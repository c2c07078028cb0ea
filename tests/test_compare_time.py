"""Step times in pairs: what is measured again, and that no entry mixes machines. Runs are stood in for."""

import json

import compare_time
import pytest

import variants

OURS, PEER = "shared-prefix", "upstream@1"


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """`compared(pairs, machine)` returns the entries after comparing; `compared.runs` are the variants that ran."""
    env = {"device": "cpu", "cpu": None, "num_threads": 1, "lowmem_sha256": {}}
    monkeypatch.setattr(compare_time, "environment", lambda: env)
    monkeypatch.setattr(variants, "lowmem_changed", lambda recorded: False)

    def measure(variant, k, config, options, allocator):
        compare.runs.append(variant)
        seconds = 2.0 if variant == OURS else 6.0
        summary = {"step_time_s": [9.0, seconds], "step_phase_time_s": [{"generate": 9.0}, {"generate": seconds}]}
        tokens = {"prompt_tokens_per_row": [512, 512], "completion_tokens_per_row": [53, 40]}
        return {"status": "ok", "summary": summary, "tokens": tokens, "env": env}

    def compare(pairs, machine="one CPU", *options):
        env["cpu"] = machine
        words = ["--variants", PEER, OURS, "--workload", "cpu", "--k", "2", "--pairs", str(pairs)]
        assert compare_time.main([*words, "--runs", str(tmp_path), *options]) == 0
        return json.loads((tmp_path / "time_pairs.json").read_text())

    compare.runs = []
    monkeypatch.setattr(compare_time, "measure", measure)
    return compare


def test_pairs_are_added_and_not_measured_again(compared):
    name = f"cpu/{OURS}_vs_{PEER}_k2/one CPU"
    entry = compared(2)[name]
    assert compared.runs == [PEER, OURS] * 2
    assert entry["pairs_s"] == [[6.0, 2.0]] * 2 and entry["phase_pairs_s"][0][0] == {"generate": 6.0}
    assert entry["ratio_median"] == pytest.approx(1 / 3)
    assert entry["tokens_per_row"] == [512, 53] and entry["completion_tokens"] == [93, 93]
    compared(2)
    assert len(compared.runs) == 4
    assert len(compared(3)[name]["pairs_s"]) == 3 and len(compared.runs) == 6


def test_another_machine_is_another_entry(compared):
    before = compared(1)
    after = compared(1, "another CPU")
    assert len(compared.runs) == 4 and len(after) == 2
    assert before.items() <= after.items()
    assert {entry["machine"] for entry in after.values()} == {"one CPU", "another CPU"}


@pytest.mark.parametrize("changed", ["num_threads", "trees", "workload", "library"])
def test_what_was_made_otherwise_is_measured_again(compared, monkeypatch, changed):
    compared(1)
    if changed == "num_threads":
        compare_time.environment()["num_threads"] = 2
    elif changed == "trees":
        monkeypatch.setattr(compare_time.variants, "tree_of", lambda variant: type("Tree", (), {"commit": "new"}))
    elif changed == "workload":
        monkeypatch.setattr(compare_time.yaml, "safe_load", lambda text: {"prompt_tokens": 8192})
    else:
        monkeypatch.setattr(variants, "lowmem_changed", lambda recorded: True)
    (entry,) = compared(1).values()
    assert len(entry["pairs_s"]) == 1 and len(compared.runs) == 4


def test_several_peers_are_measured_against_one_run_of_the_last(compared, tmp_path):
    compared(1)
    words = ["--variants", PEER, "string-level", OURS, "--workload", "cpu", "--k", "2", "--runs", str(tmp_path)]
    assert compare_time.main([*words, "--pairs", "2"]) == 0
    entries = json.loads((tmp_path / "time_pairs.json").read_text())
    assert set(entries) == {f"cpu/{OURS}_vs_{peer}_k2/one CPU" for peer in (PEER, "string-level")}
    assert all(len(entry["pairs_s"]) == 2 for entry in entries.values())
    assert compared.runs == [PEER, OURS, PEER, "string-level", OURS, "string-level", OURS]
    assert len({entry["trees"][0] for entry in entries.values()}) == 2, "each comparison names its own peer's tree"


@pytest.mark.parametrize("names", [[OURS], [PEER, OURS, PEER], [PEER, PEER]])
def test_a_comparison_needs_different_variants(compared, capsys, names):
    with pytest.raises(SystemExit):
        compare_time.main(["--variants", *names])
    assert "one variant or more and then the one" in capsys.readouterr().err and not compared.runs


def test_an_option_of_the_run_is_part_of_the_name(compared):
    assert set(compared(1, "one CPU", "--gradient_checkpointing", "True")) == {
        f"cpu/{OURS}_vs_{PEER}_k2/gradient_checkpointing/True/one CPU"
    }


def test_another_allocator_is_another_entry_and_reaches_the_run(compared, monkeypatch):
    allocators = []
    measure = compare_time.measure
    monkeypatch.setattr(compare_time, "measure", lambda *args: allocators.append(args[-1]) or measure(*args))
    kept, own = compared(1), compared(1, "one CPU", "--allocator", "glibc")
    (name,) = own.keys() - kept.keys()
    assert name == f"cpu/{OURS}_vs_{PEER}_k2/allocator/glibc/one CPU"
    assert own[name]["allocator"] is None and allocators == [compare_time.ALLOCATORS["keeping"]] * 2 + [None] * 2


def test_a_run_that_fails_is_named_and_leaves_what_was_measured(compared, monkeypatch, capsys, tmp_path):
    before = compared(1)

    def fails(*args):
        raise RuntimeError("upstream@1 at k = 2 did not run:\nout of memory")

    monkeypatch.setattr(compare_time, "measure", fails)
    words = ["--variants", PEER, OURS, "--workload", "cpu", "--k", "2", "--pairs", "2", "--runs", str(tmp_path)]
    assert compare_time.main(words) == 1
    assert "upstream@1 at k = 2 did not run" in capsys.readouterr().err
    assert json.loads((tmp_path / "time_pairs.json").read_text()) == before


def test_a_peer_that_is_out_of_memory_is_an_outcome_and_the_others_go_on(compared, monkeypatch, capsys, tmp_path):
    measure = compare_time.measure

    def tight(variant, *args):
        record = measure(variant, *args)
        failed = {"status": "oom", "error": "can't allocate memory", "config": {"budget_gib": 16}, "tokens": None}
        return record | failed if variant == "upstream" else record

    monkeypatch.setattr(compare_time, "measure", tight)
    words = ["--workload", "cpu", "--k", "2", "--pairs", "2", "--runs", str(tmp_path)]
    assert compare_time.main(["--variants", "upstream", PEER, OURS, *words]) == 0
    assert "pair 1/2: upstream out of memory, upstream@1 6.00 s, shared-prefix 2.00 s" in capsys.readouterr().out
    entries = json.loads((tmp_path / "time_pairs.json").read_text())
    failed, whole = (entries[f"cpu/{OURS}_vs_{peer}_k2/cpu"] for peer in ("upstream", PEER))
    assert failed["out_of_memory"] == {"budget_gib": 16, "error": "can't allocate memory"} and not failed["pairs_s"]
    assert len(whole["pairs_s"]) == 2 and "out_of_memory" not in whole
    assert compared.runs == ["upstream", PEER, OURS, PEER, OURS], "it is not tried again"
    assert compare_time.main(["--variants", "upstream", OURS, *words, "--k", "8"]) == 0
    assert compared.runs[5:] == ["upstream"], "nothing is left to compare ours with"
    alone = json.loads((tmp_path / "time_pairs.json").read_text())[f"cpu/{OURS}_vs_upstream_k8/cpu"]
    assert alone["out_of_memory"] == failed["out_of_memory"] and alone["lowmem_sha256"] == {} and alone["env"]
    swapped = {OURS: "upstream", PEER: PEER}  # now ours is the one out of memory
    monkeypatch.setattr(compare_time, "measure", lambda variant, *args: tight(swapped[variant], *args))
    assert compare_time.main(["--variants", PEER, OURS, *words, "--k", "4"]) == 1
    assert "shared-prefix at k = 4 did not run:\ncan't allocate memory" in capsys.readouterr().err
