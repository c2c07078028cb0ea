#!/usr/bin/env bash
# One setting of the variant 'shared-prefix': experiments/run_shared-prefix_rloo.sh K [options]; -h for help.
exec "$(dirname "${BASH_SOURCE[0]}")/run_variant.sh" shared-prefix "$@"
