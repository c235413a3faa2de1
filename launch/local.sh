#!/usr/bin/env bash
# Trains on the GPUs of this host by torchrun: `launch/local.sh 8 experiment=huginn-100m`.
#
# torchrun ends with 1 whatever a rank ended with; launch/plain.sh keeps the exit codes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh RANKS [OVERRIDES...]   (RANKS is '${1:-}', not a number)" >&2
    exit 64
fi
export LOCAL_WORLD_SIZE=$1
shift
# shellcheck source=launch/env/python.sh
source launch/env/python.sh
# Before torchrun, which would otherwise allow one thread per rank, however many cores there are.
# shellcheck source=launch/env/threads.sh
source launch/env/threads.sh
exec "$PRETRAIN_PYTHON" -m torch.distributed.run --standalone \
    --nproc-per-node "$LOCAL_WORLD_SIZE" --no-python launch/node.sh train "$@"
