"""The fork tool: reproducible trees, and clear ends that leave the last good tree. In a copy of the trl/ folder."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import variants

PIN = "v0.20.0"
fork = variants.load_fork()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the built pin with the cached sdist; returns its folder."""
    shutil.copytree(ROOT / "trl" / ".sdist", tmp_path / ".sdist")
    shutil.copytree(ROOT / "trl" / PIN, tmp_path / PIN, symlinks=True)
    monkeypatch.setattr(fork, "ROOT", tmp_path)
    monkeypatch.delenv("TRL_SDIST_DIR", raising=False)
    return tmp_path / PIN


def quiet(_):
    pass


def test_two_builds_give_the_same_commits(tree):
    before = json.loads((tree / "built.json").read_text())
    shutil.rmtree(tree / "src")
    after = fork.build(PIN, force=True, log=quiet)
    assert after == before == json.loads((tree / "built.json").read_text())
    assert [s["subject"] for s in after["stages"]][:2] == [f"upstream {PIN}", "rloo: repeat prompts as strings"]


def test_every_stage_is_laid_out_and_differs(tree):
    texts = set()
    for stage in json.loads((tree / "built.json").read_text())["stages"]:
        folder = tree / "stages" / stage["name"]
        files = ("rloo_trainer", "rloo_config", "utils", "ppo_trainer", "ppo_config")
        texts.add("".join((folder / f"trl/trainer/{name}.py").read_text() for name in files))
        assert (folder / "trl.egg-info/PKG-INFO").exists(), "TRL would report another installed version"
    assert len(texts) == len(json.loads((tree / "built.json").read_text())["stages"])


def test_patch_file_names_are_printed(tree, capsys):
    fork.build(PIN, force=True)
    printed = capsys.readouterr().out
    for name in (tree / "patches/.patches").read_text().split():
        assert name in printed


def test_check_proves_the_round_trip(tree, capsys):
    fork.check(PIN)
    assert "export and import agree" in capsys.readouterr().out


def test_check_sees_an_edited_patch(tree):
    patch = fork.patch_files(PIN)[0]
    patch.write_text(patch.read_text().replace("Reason: upstreamable", "Reason:   upstreamable\n\n", 1))
    with pytest.raises(fork.ForkError, match="is not what export writes"):
        fork.check(PIN)


def assert_still_good(tree, before: str):
    assert (tree / "built.json").read_text() == before
    assert (tree / "src/.git").exists() and (tree / "stages/0/trl/__init__.py").exists()
    assert not list(tree.glob(".tmp-*")), "a failed build leaves nothing behind"


def test_wrong_hash_leaves_the_last_good_tree(tree):
    before = (tree / "built.json").read_text()
    sdist = tree.parent / ".sdist/trl-0.20.0.tar.gz"
    sdist.write_bytes(sdist.read_bytes()[:-1] + b"x")
    with pytest.raises(fork.ForkError, match="expected 3f949b009b79"):
        fork.build(PIN, force=True, log=quiet)
    assert_still_good(tree, before)


def test_missing_network_leaves_the_last_good_tree(tree, monkeypatch):
    before = (tree / "built.json").read_text()
    (tree.parent / ".sdist/trl-0.20.0.tar.gz").unlink()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tree / "nowhere")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(fork.ForkError, match="could not fetch trl-0.20.0.tar.gz with pip.*TRL_SDIST_DIR"):
        fork.build(PIN, force=True, log=quiet)
    assert_still_good(tree, before)


def test_sdist_folder_without_the_sdist(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_SDIST_DIR", str(tmp_path / "empty"))
    with pytest.raises(fork.ForkError, match="holds no trl-0.20.0.tar.gz"):
        fork.fetch_sdist(PIN)


def test_patch_that_does_not_apply_leaves_the_last_good_tree(tree):
    before = (tree / "built.json").read_text()
    patch = fork.patch_files(PIN)[1]
    patch.write_text(patch.read_text().replace("padded_query_responses = pad(", "other = pad("))
    with pytest.raises(fork.ForkError, match=f"patch {patch.name} does not apply"):
        fork.build(PIN, log=quiet)
    assert_still_good(tree, before)


def test_list_and_files_must_match(tree):
    (tree / "patches/.patches").write_text("0001-missing.patch\n")
    with pytest.raises(fork.ForkError, match="listed only \\['0001-missing.patch'\\]"):
        fork.build(PIN, log=quiet)


def test_work_in_src_is_not_lost_and_can_be_exported(tree):
    target = tree / "src/trl/trainer/rloo_config.py"
    target.write_text(target.read_text() + "\n# an idea\n")
    with pytest.raises(fork.ForkError, match="holds work that"):
        fork.build(PIN, force=True, log=quiet)
    with pytest.raises(fork.ForkError, match="uncommitted changes"):
        fork.export(PIN, log=quiet)
    count = len(fork.patch_files(PIN))
    fork.run_git("commit", "--all", "--message", "rloo: an idea\n\nReason: local", cwd=tree / "src")
    fork.export(PIN, log=quiet)
    assert [p.name for p in fork.patch_files(PIN)][count:] == [f"{count + 1:04d}-rloo-an-idea.patch"]
    assert fork.stage(PIN).name == str(count + 1) and fork.stage(PIN).subject == "rloo: an idea"
    fork.check(PIN, log=quiet)


def test_stage_that_is_not_built_or_out_of_date(tree):
    with pytest.raises(fork.ForkError, match="has no stage '99'"):
        fork.stage(PIN, "99")
    patch = fork.patch_files(PIN)[0]
    patch.write_text(patch.read_text() + "\n")
    with pytest.raises(fork.ForkError, match="was built from another patch series"):
        fork.stage(PIN)
    (tree / "built.json").unlink()
    with pytest.raises(fork.ForkError, match="is not built. Run"):
        fork.stage(PIN)


def test_diff_shows_what_a_pull_request_would_carry():
    command = [sys.executable, str(ROOT / "trl/fork.py"), "diff", "v1.16.0", "--stat"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "trl/trainer/utils.py" in result.stdout


def test_no_upstream_source_is_committed():
    tracked = subprocess.run(["git", "ls-files", "trl"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked, "not a git checkout"
    for name in tracked:
        assert name.endswith((".patch", ".patches")) or name == "trl/fork.py", name
