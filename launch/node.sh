#!/usr/bin/env bash
# One process of a job: `launch/node.sh COMMAND OVERRIDES...` is `pretrain COMMAND OVERRIDES...` with
# the environment of launch/env. srun starts one of these per GPU; plain.sh starts them on one host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# SIGUSR1 means save and leave. Until the program listens, it must not kill.
trap '' USR1

for file in launch/env/*.sh; do
    # shellcheck source=/dev/null
    source "$file"
done
exec "$PRETRAIN_PYTHON" -m pretrain "$@"
