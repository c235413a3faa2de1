# shellcheck shell=bash
# Sourced by the launchers, last: it leaves the folder that the others are named in.

# A job that runs from a snapshot of the code reads and writes where it was submitted.
if [[ -n ${PRETRAIN_WORKDIR:-} ]]; then
    # The snapshot's code goes before that of the folder and that of the interpreter.
    export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    cd "$PRETRAIN_WORKDIR" || exit 64
fi
