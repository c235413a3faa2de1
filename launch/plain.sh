#!/usr/bin/env bash
# Trains on this host as plain processes, without torchrun: `launch/plain.sh 2 experiment=...`.
#
# SIGTERM, SIGINT and SIGUSR1 reach every rank, which saves and ends with 75. This script ends with
# the code of the first rank that failed, and ends the others, which would wait for it forever.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/plain.sh RANKS [OVERRIDES...]   (RANKS is '${1:-}', not a number)" >&2
    exit 64
fi
export WORLD_SIZE=$1 LOCAL_WORLD_SIZE=$1
shift
# shellcheck source=launch/env/python.sh
source launch/env/python.sh

free_port() {
    "$PRETRAIN_PYTHON" -c 'import socket
print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'
}

forward() {
    asked=$1
    kill -s "$1" "${pids[@]}" 2>/dev/null || true
}

# After a failure the other ranks have this long to end by themselves.
patience_s=20

pids=()
asked=
# Ctrl-C at a terminal reaches the ranks too; one more SIGINT would kill them, SIGTERM asks again.
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1

MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank launch/node.sh train "$@" &
    pids+=($!)
done
# what came before the last of them was there
if [[ -n $asked ]]; then forward "$asked"; fi

result=0
failed_at=
while ((${#pids[@]} > 0)); do
    # In the background, so that a signal is forwarded at once.
    sleep 0.1 &
    wait $! || true
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        code=0
        wait "$pid" || code=$?
        if ((code == 75 && result == 0)); then
            result=75
        elif ((code != 0 && code != 75)) && [[ -z $failed_at ]]; then
            result=$code
            failed_at=$SECONDS
            echo "launch/plain.sh: a rank ended with code $code; the others have $patience_s s." >&2
        fi
    done
    pids=("${running[@]+"${running[@]}"}")
    if [[ -n $failed_at ]] && ((SECONDS - failed_at >= patience_s && ${#pids[@]} > 0)); then
        forward KILL
    fi
done
exit "$result"
