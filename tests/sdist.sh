#!/bin/bash
# Builds an sdist, and from it a wheel, installs that in an environment of its own, and runs an operator there:
#   tests/sdist.sh PYTHON          PYTHON: of an environment with mprec's dependencies; nothing is put into it
# Needs g++. Fails if the sdist or the wheel holds what it should not, or lacks what it should hold.
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

same() { # the lines of standard input and the words of $2, in any order
  diff <(sort -u) <(printf '%s\n' $2 | sort) || { echo "$1 differs: < is there, > is expected"; exit 1; }
}

"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build --sdist --outdir "$work" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
sdist=("$work"/mprec-*.tar.gz)
tar tzf "${sdist[0]}" | cut -d/ -f2 |
  same "the sdist" "CHANGELOG.md CMakeLists.txt LICENSE PKG-INFO README.md csrc mprec pyproject.toml triton_kernels"
tar tzf "${sdist[0]}" | grep -E '\.(so|o|pyc)$|/\.' && { echo "the sdist has what a build left"; exit 1; }

"$python" -m venv "$work/clean"
"$work/clean/bin/pip" wheel -q --no-deps -w "$work" "${sdist[0]}"
wheel=("$work"/mprec-*.whl)
"$python" -m zipfile -l "${wheel[0]}" | awk 'NR > 1 {print $1}' | cut -d/ -f1 | same "the wheel" "mprec $(
  basename "${wheel[0]}" | cut -d- -f1,2).dist-info"
# No dependency is downloaded: the environment sees those of PYTHON, but no editable install of mprec there.
"$work/clean/bin/pip" install -q --no-deps "${wheel[0]}"
site=$("$work/clean/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"
cd "$work"
"$work/clean/bin/python" - "$site" <<'TEST'
import sys

import torch

import mprec
import mprec.nn
import mprec.triton_kernels.catalogue

assert mprec.__file__.startswith(sys.argv[1]), mprec.__file__
rows, ids = torch.randn(9, 4), torch.tensor([[1, 2], [8, 0]])
assert torch.allclose(mprec.ops.embedding_bag(ids, rows, mode="sum"), rows[ids].sum(1))
print(f"mprec {mprec.__version__} from its sdist, with {mprec._C.isa()}")
TEST
