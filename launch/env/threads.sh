# shellcheck shell=bash
# Sourced by the launchers. LOCAL_WORLD_SIZE: ranks on this host.

# Without it every rank starts a thread per core of the host, and they fight for them.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=${SLURM_CPUS_PER_TASK:-$(($(nproc) / ${LOCAL_WORLD_SIZE:-${SLURM_NTASKS_PER_NODE:-1}}))}
    export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))
fi
