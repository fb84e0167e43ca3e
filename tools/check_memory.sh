#!/usr/bin/env bash
# Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder and runs its tests.
# Usage: tools/check_memory.sh [python, with torch and pytest] [arguments for pytest]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # absolute, but an environment's link stays one
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cxx=${CXX:-g++}

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
# Leaks are not looked for: Python frees little at its end. The sanitizer must be there before Python allocates.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
export PYTHONPATH="$folder" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0
LD_PRELOAD="$preload" "$python" -c 'from tsae_kernels import available_backends as a; assert a()["cpp"] == "ok", a()["cpp"]'
run() { LD_PRELOAD="$preload" "$python" -m pytest "$@"; }
# test_kernels_ops.py compiles and measures time, test_kernels_arguments.py never reaches a kernel. Left out is what the
# reference takes long for, and other backends.
run tests/tsae_kernels/test_kernels_{activation,cpp,gradients,losses,properties,sparse,stats}.py "${@:2}" \
  -k "(cpp or test_kernels_sparse) and not lengths_in_float32 and not (long_sequences and (dtype0 or dtype2 or dtype3))"
ATEN_CPU_CAPABILITY=default run tests/tsae_kernels/test_kernels_cpp.py -k "eight_bands or written or strided" "${@:2}"
