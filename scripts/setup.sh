#!/bin/sh
# Make .venv ready for `make demo` or `make test`: check the system, create the environment, install this project into it.
# Usage: scripts/setup.sh demo|test. A later run is quick: a stamp in .venv remembers what was installed from which pyproject.toml.
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
    demo) extras="" ;;
    test) extras="[reference,cuda,webgpu,metal,test]" ;;
    *) echo "usage: $0 demo|test" >&2; exit 2 ;;
esac

say() { echo "==> $*"; }

# What must be there, and cannot come from pip ------------------------------------------------------------------------

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
}

has_compiler() {
    if [ "$(uname)" = Darwin ]; then xcode-select -p >/dev/null 2>&1; return; fi  # /usr/bin/c++ is a stub without the tools
    for candidate in ${CXX:-} c++ g++ clang++ cc gcc clang; do  # to link with: a C driver is enough
        if command -v "$candidate" >/dev/null 2>&1; then return 0; fi
    done
    return 1
}

python=$(find_python)
missing="" packages=""
if [ -z "$python" ]; then
    missing="$missing, Python 3.10 or newer" packages="$packages python3 python3-venv"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then  # Debian ships Python without these two
    missing="$missing, Python's venv module" packages="$packages python3-venv"
fi
if ! has_compiler; then missing="$missing, a C++ compiler" packages="$packages g++"; fi
if [ -n "$missing" ]; then
    echo "missing on this machine: ${missing#, }" >&2
    if [ "$(uname)" = Darwin ]; then
        echo "install them with: xcode-select --install (compiler), and Python from python.org or Homebrew" >&2
    else
        echo "install them with: sudo apt-get update && sudo apt-get install -y$packages" >&2
    fi
    exit 1
fi

# The environment -----------------------------------------------------------------------------------------------------

if [ -e .venv ] && ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    say ".venv does not run here any more (was it copied, or its Python removed?): making it anew"
    "$python" -m venv --clear .venv
elif [ ! -e .venv ]; then
    say "making a virtual environment in .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

# An editable install holds this folder's path, so that a moved checkout needs it again.
state="$(cksum < pyproject.toml) $(pwd)"
# make test installs all that make demo needs
for done in .venv/.ready-test ".venv/.ready-$1"; do
    if [ -f "$done" ] && [ "$(cat "$done")" = "$state" ]; then exit 0; fi
done
if [ "$1" = test ]; then
    say "installing gpt2-tvm, transformers as the reference, compilers for the targets and checkers into .venv (about 3 GB, once)"
else
    say "installing gpt2-tvm and what it needs into .venv (about 600 MB, once)"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
echo "$state" > ".venv/.ready-$1"
