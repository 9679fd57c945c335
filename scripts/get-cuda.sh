#!/bin/sh
# Fetches NVIDIA's compiler from PyPI into .cuda/, where build.rs looks for it: 104 MB to download, 271 MB on disk.
# Needs Python 3 with pip or venv, and gcc, which nvcc calls. Building for a GPU needs no more; running needs NVIDIA's
# driver.
set -eu

# One release throughout, but for the tools that look into what it made.
packages="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86"

fail() {
    echo "get-cuda.sh: $*" >&2
    exit 1
}

cd "$(dirname "$0")/.."
home=.cuda/nvidia/cu13
work=

# Compiles a kernel for the architectures that build.rs takes by default.
works() {
    work=$(mktemp -d)
    printf '%s\n' '#include <cuda_runtime.h>' \
        'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }' >"$work/twice.cu"
    "$1/bin/nvcc" -fatbin -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
        -o "$work/twice.fatbin" "$work/twice.cu" >"$work/log" 2>&1
}
trap 'rm -rf "$work" .cuda.new' EXIT

[ "$(uname -s)" = Linux ] || fail "NVIDIA's compiler runs on Linux"
command -v gcc >/dev/null || fail "nvcc needs gcc, which was not found; install it"
if [ -x "$home/bin/nvcc" ]; then
    works "$home" || fail "$home is there but does not compile; remove .cuda and try again:
$(cat "$work/log")"
    echo "$home is already there and compiles"
    exit 0
fi

command -v python3 >/dev/null || fail "python3 was not found; install it"
rm -rf .cuda.new
if python3 -m pip --version >/dev/null 2>&1; then
    pip="python3 -m pip"
else
    # Debian keeps pip apart from Python; an environment of its own brings it along.
    python3 -m venv .cuda.new/venv || fail "python3 has neither pip nor venv; install one of them"
    pip=.cuda.new/venv/bin/pip
fi
export PIP_ROOT_USER_ACTION=ignore # no warning in containers
# shellcheck disable=SC2086 # a list of words
$pip install --quiet --disable-pip-version-check --no-deps --target .cuda.new/packages $packages ||
    fail "pip could not fetch the packages; does this machine reach pypi.org?"

new=.cuda.new/packages
[ -x "$new/nvidia/cu13/bin/nvcc" ] || fail "the packages hold no nvidia/cu13/bin/nvcc"
ln -sfn lib "$new/nvidia/cu13/lib64"
ln -sf libcudart.so.13 "$new/nvidia/cu13/lib/libcudart.so"
works "$new/nvidia/cu13" || fail "the nvcc that was fetched does not compile:
$(cat "$work/log")"
rm -rf .cuda
mv "$new" .cuda
touch build.rs # so that cargo looks for nvcc again
echo "$home is there and compiles; cargo build finds it"
