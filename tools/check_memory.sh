#!/usr/bin/env bash
# Runs the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer, on a CPU.
# Usage: tools/check_memory.sh cpu|cuda [python with torch and pytest] [pytest arguments]
#   cpu:  the CPU library, built in a temporary folder
#   cuda: the CUDA kernels, compiled for the host (tests/tsae_kernels/cuda_emulation)
set -euo pipefail

library=${1:-}
case $library in
  cpu | cuda) ;;
  *) echo "error: the first argument must be cpu or cuda, got '$library'" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${2:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # absolute, keeping a virtual environment's symlink
arguments=("${@:3}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cxx=${CXX:-g++}
# No leak check, as Python does not free everything at exit. The sanitizer must be loaded before Python allocates.
export PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
sanitized_python() { LD_PRELOAD="$preload" "$python" "$@"; }

# Not run: test_kernels_ops.py, which compiles and measures time, and test_kernels_arguments.py, which calls no kernel.
test_files() {
  local name
  for name in "$@"; do printf '%s\n' "tests/tsae_kernels/test_kernels_$name.py"; done
}

check_cpu() {
  local torch
  cp -r "$root"/{tsae_kernels,tests,csrc,pyproject.toml} "$folder"
  rm -f "$folder"/tsae_kernels/*.so
  torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
  printf '%s\n' ops sparse_ops baseline avx2 avx512 | xargs -P "$(nproc)" -I NAME \
    "$cxx" -std=c++20 -O1 -g -fPIC -fvisibility=hidden -Wno-psabi -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined -DTORCH_TARGET_VERSION=0x020b000000000000 \
    -I"$folder/csrc" -isystem "$torch/include" -c "$folder/csrc/cpu/NAME.cpp" -o "$folder/NAME.o"
  "$cxx" -shared -fsanitize=address,undefined "$folder"/*.o -o "$folder/tsae_kernels/_cpu.abi3.so" \
    -L"$torch/lib" -ltorch_cpu -lc10 -Wl,-rpath,"$torch/lib"
  cd "$folder"
  export PYTHONPATH=$folder
  sanitized_python -c 'from tsae_kernels import available_backends as a; assert a()["cpp"] == "ok", a()["cpp"]'
  # Without the other backends, and without cases that the reference backend takes long for.
  # shellcheck disable=SC2046  # one word per file
  sanitized_python -m pytest $(test_files activation cpp gradients losses properties sparse stats) \
    -k "(cpp or test_kernels_sparse) and not lengths_in_float32 and not (long_sequences and (dtype0 or dtype2 or dtype3))" \
    "${arguments[@]}"
  # shellcheck disable=SC2046
  ATEN_CPU_CAPABILITY=default sanitized_python -m pytest $(test_files cpp) -k "eight_bands or written or strided" \
    "${arguments[@]}"
}

check_cuda() {
  local emulation=$root/tests/tsae_kernels/cuda_emulation
  export TSAE_EMULATED_LIBRARY=$folder/emulated.so
  "$python" "$emulation/build.py" --sanitize "$TSAE_EMULATED_LIBRARY"
  cd "$root"
  export PYTHONPATH=$root:$emulation
  # shellcheck disable=SC2046
  sanitized_python -m pytest -p emulated_backend -p no:cacheprovider -k cuda \
    $(test_files activation cuda losses properties stats transitions) "${arguments[@]}"
  # shellcheck disable=SC2046
  sanitized_python -m pytest -p emulated_backend -p no:cacheprovider -k "cuda and agree" \
    $(test_files gradients) "${arguments[@]}"
}

"check_$library"
