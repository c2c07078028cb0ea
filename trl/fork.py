#!/usr/bin/env python3
"""Build, show, store and check the patched TRL trees. Nothing of TRL's source is committed here, only our patches.

A pin is one upstream release. `build` fetches its sdist, checks the sha256, commits it in a git repository of its own
(`trl/<pin>/src`, tag `upstream`) and applies the patch series with `git am`: one patch, one commit, the same commit
ids on every machine. Every prefix of the series is also laid out as a plain tree in `trl/<pin>/stages/<n>`, so that a
run can import upstream (stage 0), the whole series, or anything between (an ablation). A patch in
`trl/<pin>/exhibits/` is not part of the series: it is applied to upstream alone and becomes a stage of its own name.

    python trl/fork.py build [PIN ...]      fetch, patch, lay out (skips what is up to date; --force rebuilds)
    python trl/fork.py diff PIN             what an upstream pull request would carry (more options go to git diff)
    python trl/fork.py export PIN           write the commits of trl/PIN/src back to trl/PIN/patches
    python trl/fork.py check [PIN ...]      prove that export, then build, gives the identical tree and patch files

Needs Python >= 3.10, git and pip. `TRL_SDIST_DIR` names a folder with the sdists for a machine without a network.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SDIST_SHA256 = {
    "v0.20.0": "3f949b009b79dc609cd8f5469d67209ab8f71c5cb4d8d979f7b568ef054922fa",
    "v1.16.0": "999bd4a85b08870b7bfa387e1efa5177d2a4b88fe82b2526a057ac5d3cc600cd",
}
# One identity and one date for every commit: with the same content they give the same commit ids everywhere.
IDENTITY = {"NAME": "trl fork", "EMAIL": "fork@localhost", "DATE": "2026-01-01T00:00:00+0000"}
FORMAT_PATCH = ("--zero-commit", "--no-signature", "--no-stat", "--keep-subject", "--full-index", "--no-renames")


class ForkError(Exception):
    """A build that cannot go on; the message says what was wrong and what to do. The last good tree is kept."""


@dataclass(frozen=True)
class Stage:
    """One importable tree. `path` holds the package `trl`; `series_sha256` names the patches that made it."""

    pin: str
    name: str
    commit: str
    subject: str
    series_sha256: str

    @property
    def path(self) -> Path:
        return ROOT / self.pin / "stages" / self.name


def run_git(*args: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Runs git without the user's configuration, with the fixed identity."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", "TZ": "UTC"}
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_{key}": value for key, value in IDENTITY.items()}
    command = ["git", "-c", "core.fileMode=false", "-c", "core.autocrlf=false", "-c", "gc.auto=0", *args]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if check and result.returncode:
        raise ForkError(f"git {' '.join(args)} failed in {cwd}:\n{result.stdout}{result.stderr}")
    return result


def patch_files(pin: str) -> list[Path]:
    """The series in order, from `.patches`; an error if that list and the files differ."""
    folder = ROOT / pin / "patches"
    listed = (folder / ".patches").read_text().split() if (folder / ".patches").exists() else []
    present = {path.name for path in folder.glob("*.patch")}
    if set(listed) != present or len(listed) != len(set(listed)):
        raise ForkError(
            f"{folder}/.patches does not match the files beside it: listed only {sorted(set(listed) - present)}, "
            f"present only {sorted(present - set(listed))}. Run `python trl/fork.py export {pin}` or mend the list."
        )
    return [folder / name for name in listed]


def exhibit_files(pin: str) -> list[Path]:
    return sorted((ROOT / pin / "exhibits").glob("*.patch"))


def series_sha256(pin: str) -> str:
    """One hash for all that decides a build: the sdist, the patches in their order, and the exhibits."""
    digest = hashlib.sha256(SDIST_SHA256[pin].encode())
    for path in patch_files(pin) + exhibit_files(pin):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_sdist(pin: str) -> Path:
    """Path of the pinned sdist with the right sha256: from `TRL_SDIST_DIR`, from the cache, or by pip."""
    name = f"trl-{pin[1:]}.tar.gz"
    given = os.environ.get("TRL_SDIST_DIR")
    cache = Path(given) if given else ROOT / ".sdist"
    path = cache / name
    if not path.exists():
        if given:
            raise ForkError(f"TRL_SDIST_DIR={given} holds no {name}. Put the sdist there or unset TRL_SDIST_DIR.")
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", "trl", "--dest", tmp, f"trl=={pin[1:]}"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode or not (Path(tmp) / name).exists():
                raise ForkError(
                    f"could not fetch {name} with pip (is there a network, and does pip reach its index?). Fetch it "
                    f"elsewhere and name its folder in TRL_SDIST_DIR. pip said:\n{result.stderr.strip()[-1500:]}"
                )
            os.replace(Path(tmp) / name, path)
    found = file_sha256(path)
    if found != SDIST_SHA256[pin]:
        raise ForkError(
            f"{path} has sha256 {found}, expected {SDIST_SHA256[pin]}. It is not the pinned release: delete the file "
            "and build again; if it happens again, the index serves another file under this name."
        )
    return path


def apply_patch(repo: Path, patch: Path) -> None:
    result = run_git("am", "--keep-cr", "--committer-date-is-author-date", str(patch), cwd=repo, check=False)
    if result.returncode:
        run_git("am", "--abort", cwd=repo, check=False)
        raise ForkError(
            f"patch {patch.name} does not apply:\n{result.stdout}{result.stderr}\n"
            "Rebase it: docs/patches.md, 'Rebase recipe'. The last good tree was left as it is."
        )


def lay_out(repo: Path, commit: str, target: Path) -> None:
    """Writes the tree of `commit` as plain files, without git."""
    target.mkdir(parents=True)
    archive = subprocess.Popen(["git", "archive", commit], cwd=repo, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
        tar.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    if archive.wait():
        raise ForkError(f"git archive {commit} failed in {repo}")


def make_repository(pin: str, repo: Path, patches: list[Path], log=print) -> list[dict]:
    """Upstream plus `patches` in a fresh repository; one `{name, commit, subject}` per stage, upstream first."""
    repo.mkdir(parents=True)
    with tarfile.open(fetch_sdist(pin)) as tar:
        for member in tar.getmembers():
            member.name = member.name.partition("/")[2]  # drop "trl-0.20.0/"
            if member.name:
                tar.extract(member, repo, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    run_git("init", "--quiet", "--initial-branch=main", cwd=repo)
    run_git("add", "--all", "--force", cwd=repo)  # --force: trl.egg-info carries the version that trl reports
    run_git("commit", "--quiet", "--message", f"upstream {pin}", cwd=repo)
    run_git("tag", "upstream", cwd=repo)
    stages = [{"name": "0", "commit": head(repo), "subject": f"upstream {pin}"}]
    log(f"{pin}: {stages[0]['commit'][:12]} upstream")
    for number, patch in enumerate(patches, start=1):
        apply_patch(repo, patch)
        stages.append({"name": str(number), "commit": head(repo), "subject": subject(repo)})
        log(f"{pin}: {stages[-1]['commit'][:12]} {patch.name}")
    return stages


def head(repo: Path) -> str:
    return run_git("rev-parse", "HEAD", cwd=repo).stdout.strip()


def subject(repo: Path) -> str:
    return run_git("log", "-1", "--format=%s", cwd=repo).stdout.strip()


def built_record(pin: str) -> dict | None:
    path = ROOT / pin / "built.json"
    return json.loads(path.read_text()) if path.exists() else None


def build(pin: str, force: bool = False, log=print) -> dict:
    """Builds one pin and returns its record (`built.json`). An up-to-date tree is left alone unless `force`."""
    wanted = series_sha256(pin)
    record = built_record(pin)
    complete = record and all((ROOT / pin / "stages" / s["name"] / "trl").is_dir() for s in record["stages"])
    if complete and record["series_sha256"] == wanted and (ROOT / pin / "src").is_dir() and not force:
        log(f"{pin}: up to date ({len(record['stages'])} stages)")
        return record
    source = ROOT / pin / "src"
    if source.exists():
        refuse_to_lose_work(pin, source, record)
    tmp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=ROOT / pin))
    try:
        repo = tmp / "src"
        stages = make_repository(pin, repo, patch_files(pin), log)
        tip = stages[-1]["commit"]
        for exhibit in exhibit_files(pin):
            run_git("checkout", "--quiet", "--detach", "upstream", cwd=repo)
            apply_patch(repo, exhibit)
            stages.append({"name": exhibit.stem, "commit": head(repo), "subject": subject(repo)})
            run_git("tag", f"exhibit/{exhibit.stem}", cwd=repo)
            log(f"{pin}: {stages[-1]['commit'][:12]} exhibit {exhibit.name}")
        run_git("checkout", "--quiet", "main", cwd=repo)
        for stage in stages:
            lay_out(repo, stage["commit"], tmp / "stages" / stage["name"])
        record = {"pin": pin, "series_sha256": wanted, "tip": tip, "stages": stages}
        (ROOT / pin / "built.json").unlink(missing_ok=True)  # between here and the last line the tree is "not built"
        for name in ("src", "stages"):
            if (ROOT / pin / name).exists():
                os.replace(ROOT / pin / name, tmp / f"old-{name}")
            os.replace(tmp / name, ROOT / pin / name)
        (tmp / "built.json").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(tmp / "built.json", ROOT / pin / "built.json")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return record


def changed_files(source: Path) -> list[str]:
    """Edited and new files, without Python's caches."""
    lines = run_git("status", "--porcelain", "--untracked-files=all", cwd=source).stdout.splitlines()
    return [line for line in lines if "__pycache__" not in line]


def refuse_to_lose_work(pin: str, source: Path, record: dict | None) -> None:
    """A rebuild replaces `src`: commits or edits that no patch file holds would be gone."""
    unknown_tip = record is None or head(source) != record["tip"]
    if changed_files(source) or (unknown_tip and not exported(pin, source)):
        raise ForkError(
            f"{source} holds work that trl/{pin}/patches does not. Commit it there and run "
            f"`python trl/fork.py export {pin}`, or delete the folder to drop it."
        )


def format_patches(repo: Path, target: Path) -> list[str]:
    """Writes the commits after `upstream` as patch files and returns their names in order."""
    target.mkdir(parents=True, exist_ok=True)
    out = run_git("format-patch", *FORMAT_PATCH, "--output-directory", str(target), "upstream..main", cwd=repo).stdout
    return [Path(line).name for line in out.split()]


def exported(pin: str, source: Path) -> bool:
    with tempfile.TemporaryDirectory() as tmp:
        names = format_patches(source, Path(tmp))
        stored = patch_files(pin)
        same_names = names == [path.name for path in stored]
        return same_names and all((Path(tmp) / path.name).read_bytes() == path.read_bytes() for path in stored)


def export(pin: str, log=print) -> None:
    """Writes the commits of `trl/<pin>/src` to `trl/<pin>/patches`, then builds from them."""
    source = ROOT / pin / "src"
    if not source.exists():
        raise ForkError(f"{source} does not exist. Run `python trl/fork.py build {pin}` first.")
    if changed_files(source):
        raise ForkError(f"{source} has uncommitted changes. Commit them there (one idea, one commit), then export.")
    folder = ROOT / pin / "patches"
    with tempfile.TemporaryDirectory(dir=ROOT / pin, prefix=".tmp-") as tmp:
        names = format_patches(source, Path(tmp))
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.patch"):
            old.unlink()
        for name in names:
            os.replace(Path(tmp) / name, folder / name)
            log(f"{pin}: exported {name}")
    (folder / ".patches").write_text("".join(f"{name}\n" for name in names))
    build(pin, log=log)


def check(pin: str, log=print) -> None:
    """Builds the series in a scratch repository, exports it, builds again: same patch bytes, same tree, same ids."""
    stored = patch_files(pin)
    with tempfile.TemporaryDirectory() as tmp:
        first = make_repository(pin, Path(tmp) / "first", stored, log=lambda _: None)
        names = format_patches(Path(tmp) / "first", Path(tmp) / "exported")
        if names != [path.name for path in stored]:
            raise ForkError(f"{pin}: export gives the files {names}, the series lists {[p.name for p in stored]}")
        for path in stored:
            if (Path(tmp) / "exported" / path.name).read_bytes() != path.read_bytes():
                raise ForkError(
                    f"{pin}: {path.name} is not what export writes. Run `python trl/fork.py export {pin}`."
                )
        again = make_repository(
            pin, Path(tmp) / "second", [Path(tmp) / "exported" / n for n in names], log=lambda _: None
        )
        trees = [
            run_git("rev-parse", "main^{tree}", cwd=Path(tmp) / name).stdout.strip() for name in ("first", "second")
        ]
    if trees[0] != trees[1] or first != again:
        raise ForkError(f"{pin}: export then build gives tree {trees[1]}, expected {trees[0]}")
    log(f"{pin}: {len(stored)} patches, tree {trees[0][:12]}, export and import agree")


def stage(pin: str, name: str = "tip") -> Stage:
    """The built stage `name` ("0" is upstream, "tip" the whole series). Raises `ForkError` if it is not built, or
    built from other patches than the ones that lie in `trl/<pin>/patches` now."""
    if pin not in SDIST_SHA256:
        raise ForkError(f"unknown pin {pin!r}; known: {', '.join(SDIST_SHA256)}")
    record = built_record(pin)
    if record is None:
        raise ForkError(f"the fork tree {pin} is not built. Run `python trl/fork.py build {pin}` (or ./setup_env.sh).")
    if record["series_sha256"] != series_sha256(pin):
        raise ForkError(
            f"the fork tree {pin} was built from another patch series ({record['series_sha256'][:12]}) than the one "
            f"in trl/{pin}/patches ({series_sha256(pin)[:12]}). Run `python trl/fork.py build {pin}`."
        )
    if name == "tip":
        name = str(len(patch_files(pin)))
    for found in record["stages"]:
        if found["name"] == name:
            if not (ROOT / pin / "stages" / name / "trl").is_dir():
                raise ForkError(f"the fork tree {pin} is incomplete. Run `python trl/fork.py build {pin}`.")
            return Stage(pin, name, found["commit"], found["subject"], record["series_sha256"])
    names = ", ".join(s["name"] for s in record["stages"])
    raise ForkError(f"the fork tree {pin} has no stage {name!r}; it has: {names}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="verb", required=True)
    for verb in ("build", "check"):
        command = sub.add_parser(verb)
        command.add_argument("pins", nargs="*", metavar="PIN", help=f"default: {' '.join(SDIST_SHA256)}")
        if verb == "build":
            command.add_argument("--force", action="store_true", help="build again even if up to date")
    for verb in ("diff", "export"):
        sub.add_parser(verb).add_argument("pin", choices=SDIST_SHA256)
    args, extra = parser.parse_known_args(argv)
    if extra and args.verb != "diff":
        parser.error(f"unknown arguments: {' '.join(extra)}")
    try:
        if args.verb == "diff":
            stage(args.pin)  # built, and from the present series
            return subprocess.run(["git", "diff", *extra, "upstream..main"], cwd=ROOT / args.pin / "src").returncode
        if args.verb == "export":
            export(args.pin)
            return 0
        for pin in args.pins or SDIST_SHA256:
            if pin not in SDIST_SHA256:
                raise ForkError(f"unknown pin {pin!r}; known: {', '.join(SDIST_SHA256)}")
            if args.verb == "build":
                build(pin, args.force)
            else:
                check(pin)
    except ForkError as error:
        print(f"fork.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
