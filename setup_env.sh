#!/usr/bin/env bash
# Sets up what is missing: the virtual environment .venv with the exactly pinned requirements, and both fork trees.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

usage() {
  cat <<EOF
Usage: ./setup_env.sh [-h]

Makes .venv (needs Python >= 3.10 with venv and pip), installs $TORCH_SPEC and requirements.txt, and builds the two
patched TRL trees in trl/ (needs git). Safe to run again: what is there and up to date is left alone.
Takes 2 to 5 minutes on a CPU machine with a fast network, most of it downloads.

Environment:
  PYTHON           interpreter for the environment (default: python3)
  TORCH_INDEX_URL  package index to take torch from, for another CUDA build (default: pip's own)
  TORCH_SPEC       requirement for torch (default: torch==2.13.0)
  TRL_SDIST_DIR    folder with trl-0.20.0.tar.gz and trl-1.16.0.tar.gz, for a machine without a network
EOF
}
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") ;;
  *) echo "setup_env.sh: unknown option $1 (-h for help)" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "setup_env.sh: $python is older than 3.10; name a newer one in PYTHON" >&2; exit 1; }
command -v git > /dev/null || { echo "setup_env.sh: git is missing; install it first" >&2; exit 1; }

# The stamp is written last: an environment whose set-up was interrupted is completed, not trusted.
wanted=$(cat requirements.txt; echo "$TORCH_SPEC ${TORCH_INDEX_URL:-}")
if [ "$wanted" != "$(cat .venv/installed.txt 2> /dev/null)" ]; then
  echo "setup_env.sh: installing $TORCH_SPEC and requirements.txt into .venv"
  [ -x .venv/bin/python ] || "$python" -m venv .venv ||
    { echo "setup_env.sh: could not make .venv; is the venv module installed (python3-venv on Debian)?" >&2; exit 1; }
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH_SPEC"
  "${pip[@]}" --requirement requirements.txt
  echo "$wanted" > .venv/installed.txt
fi
.venv/bin/python trl/fork.py build
