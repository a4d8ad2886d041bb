#!/usr/bin/env bash
# sdist -> wheel with the native extension -> import, away from the clone, with the torch of the environment of $1, a python.
# EAH_BUILD=none, or no C++ compiler: only the wheel without the extension.
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
step() { printf '%s s: %s\n' $SECONDS "$*"; }

git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder"
cd "$folder"
EAH_BUILD=none "$python" setup.py -q sdist --dist-dir sdist
tar -xzf sdist/eah_kernels-*.tar.gz --one-top-level=unpacked --strip-components=1
step "$(ls sdist)"

build() { "$python" -m pip wheel -q --no-index --no-deps --no-build-isolation --wheel-dir "$1" ./unpacked; }
EAH_BUILD=none build pure
test -f pure/eah_kernels-*-py3-none-any.whl
step "$(ls pure)"
if [ "${EAH_BUILD:-}" = none ] || ! command -v c++ >/dev/null; then
    echo "the wheel with the native extension is left out: EAH_BUILD=none, or no C++ compiler"
    exit
fi
EAH_BUILD=cpu build native
test -f native/eah_kernels-*-cp310-abi3-linux_*.whl
step "$(ls native)"

# An environment of its own, which sees the packages of the other but not its editable install.
"$python" -m venv new
new=$folder/new/bin/python
site=$("$new" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$new" -m pip install -q -c "$OLDPWD/constraints.txt" abi3audit
new/bin/abi3audit --strict native/*.whl  # the extension uses nothing but Python's limited API
"$new" -m pip install -q --no-index --no-deps native/*.whl
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/torch.pth"
cd /
"$new" - <<'PYTHON'
import pathlib

import torch

import eah
import eah_kernels

for package in (eah, eah_kernels):
    assert pathlib.Path(package.__file__).with_name("py.typed").exists(), package
assert "new" in eah.__file__ and "new" in eah_kernels.__file__, (eah, eah_kernels)
assert eah_kernels.native_parts()["cpu"] is None, eah_kernels.native_parts()
query = torch.randn(1, 4, 70, 64)
image = torch.arange(70)[None] < 50
native, plain = (eah_kernels.eah_attention(query, query, query, image, backend=b) for b in ("native", "reference"))
torch.testing.assert_close(native.output, plain.output)
PYTHON
"$folder/new/bin/eah" --version
step "the wheel's extension computes what the reference does"
