# shellcheck shell=bash
# Sourced by the launchers.

# A rank that dies inside a library (SIGSEGV, SIGABRT, SIGBUS) leaves its Python stack in its log.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# NCCL says nothing by default, not even why a connection failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
