#!/bin/sh
# Builds the environment that kvpress runs in:  benchmarks/kvpress/make_environment.sh DIRECTORY [pip options]
# On a machine without GPU add:  --extra-index-url https://download.pytorch.org/whl/cpu
set -eu
if [ $# -lt 1 ]; then
    echo "usage: $0 DIRECTORY [pip options]" >&2
    exit 2
fi
directory=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$directory"
"$directory/bin/pip" install -r "$here/kvpress-requirements.txt" "$@"
"$directory/bin/python" -c "import kvpress, torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
