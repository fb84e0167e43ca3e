#!/usr/bin/env bash
# Compiles the CUDA kernels for the host with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests: no
# kernel reads or writes outside its tensors or its shared memory.
# Usage: tools/check_memory_cuda.sh [python, with torch and pytest] [arguments for pytest]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # absolute, but an environment's link stays one
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cxx=${CXX:-g++}
emulation=$root/tests/tsae_kernels/cuda_emulation

"$python" "$emulation/build.py" --sanitize "$folder/emulated.so"
cd "$root"
# Leaks are not looked for: Python frees little at its end. The sanitizer must be there before Python allocates.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
export PYTHONPATH="$root:$emulation" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 TSAE_EMULATED_LIBRARY="$folder/emulated.so"
# test_kernels_ops.py compiles and measures time, test_kernels_arguments.py never reaches a kernel.
LD_PRELOAD="$preload" "$python" -m pytest -p emulated_backend -p no:cacheprovider -k cuda \
  tests/tsae_kernels/test_kernels_{activation,cuda,losses,properties,stats}.py "${@:2}"
LD_PRELOAD="$preload" "$python" -m pytest -p emulated_backend -p no:cacheprovider -k "cuda and agree" \
  tests/tsae_kernels/test_kernels_gradients.py "${@:2}"
