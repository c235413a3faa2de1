# shellcheck shell=bash
# Sourced by the launchers.

# The interpreter that has this project; set it where a container or a module brings its own.
export PRETRAIN_PYTHON=${PRETRAIN_PYTHON:-$PWD/.venv/bin/python}
if ! command -v "$PRETRAIN_PYTHON" >/dev/null; then
    echo "There is no $PRETRAIN_PYTHON on $(uname -n). Run \`make test\` once in $PWD, which makes" \
        ".venv, or set PRETRAIN_PYTHON to an interpreter that has this project." >&2
    exit 64
fi
