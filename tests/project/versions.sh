#!/usr/bin/env bash
# The swap and the backends on other versions, in environments under $1 (/tmp/eah-versions), outside CI: minutes a line.
# What is not at hand (an interpreter, a build of torch) is left out and named at the end; a failed test fails the script.
# torch comes from TORCH_INDEX, by default its builds without CUDA; https://pypi.org/simple has those with it, some GB each.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-/tmp/eah-versions}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
mkdir -p "$folder"
results=
note() { results+=$'\n'$(printf '%-52s %s' "$combination" "$*"); }

interpreter() {
    for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then echo "$candidate" && return; fi
    done
}

try() {
    local python=$1 torch=$2 triton=$3 transformers=$4
    local combination="python $1, torch $2, triton $3, transformers $4" venv=$folder/$1-$2-$3-$4 found
    echo "== $combination"
    found=$(interpreter "$python")
    if [ -z "$found" ]; then note "left out: no python$python here" && return; fi
    rm -rf "$venv" && "$found" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
    if ! "${pip[@]}" --retries 1 install --no-deps --index-url "$index" "torch==$torch" &>"$venv/log"; then
        note "left out: no torch $torch for it: $(grep ERROR "$venv/log" | tail -n 1)" && return
    fi
    git ls-files -z | xargs -0 cp --parents -t "$(mkdir -p "$venv/clone" && echo "$venv/clone")"
    local wanted=("triton==$triton" "transformers==$transformers" numpy "setuptools>=77")
    if ! "${pip[@]}" install "torch==$torch" "${wanted[@]}" &>"$venv/log" ||
        ! "${pip[@]}" install --no-build-isolation "$venv/clone[test]" "torch==$torch" "${wanted[@]}" &>"$venv/log"; then
        note "left out: cannot be installed: $(grep ERROR "$venv/log" | tail -n 1)" && return
    fi
    # Outside the clone's root the packages that were installed are tested, their native extension with them.
    rm -r "$venv"/clone/{eah_kernels,python/eah}
    (cd "$venv/clone" && "$venv/bin/python" -m pytest -n logical --maxprocesses 8 -m seam) | tee "$venv/seam"
    local swap=${PIPESTATUS[0]}
    (cd "$venv/clone" && "$venv/bin/python" -m pytest -n logical --maxprocesses 8 \
        tests/kernels/test_{backends,native,torch,decode_kernel}.py) | tee "$venv/kernels"
    local kernels=${PIPESTATUS[0]}
    [ "$swap$kernels" = 00 ] || failed=1
    note "swap: $(tail -n 1 "$venv/seam"); backends: $(tail -n 1 "$venv/kernels")"
}

failed=0
try 3.10 2.10.0 3.6.0 5.3.0
try 3.11 2.13.0 3.6.0 5.3.0
try 3.12 2.13.0 3.7.1 5.23.0
try 3.13 2.15.0 3.9.0 5.24.0
printf '\n%s\n' "${results:1}"
exit $failed
