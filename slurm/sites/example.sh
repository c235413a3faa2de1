# shellcheck shell=bash
# What a cluster needs besides the project. Copy it, fill it in, and source it before sbatch:
#
#   source slurm/sites/mine.sh && sbatch slurm/train.sbatch experiment=huginn-3.5b
#
# sbatch reads the SBATCH_... variables; the job inherits everything else.

# Who pays, and where the job runs.
export SBATCH_ACCOUNT=my-project
export SBATCH_PARTITION=gpu

# The interface that connects the nodes; NCCL and gloo otherwise take the first that is up.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# Where raw text and shards are (conf/data/huginn-mix.yaml).
export PRETRAIN_ROOT=/shared/huginn-mix
