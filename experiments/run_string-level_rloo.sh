#!/usr/bin/env bash
# One setting of the variant 'string-level': experiments/run_string-level_rloo.sh K [options]; -h for help.
exec "$(dirname "${BASH_SOURCE[0]}")/run_variant.sh" string-level "$@"
