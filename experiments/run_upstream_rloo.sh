#!/usr/bin/env bash
# One setting of the variant 'upstream': experiments/run_upstream_rloo.sh K [options]; -h for help.
exec "$(dirname "${BASH_SOURCE[0]}")/run_variant.sh" upstream "$@"
