#!/usr/bin/env bash
# One setting of the variant 'baseline': experiments/run_baseline_rloo.sh K [options]; -h for help.
exec "$(dirname "${BASH_SOURCE[0]}")/run_variant.sh" baseline "$@"
