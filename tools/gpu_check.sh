#!/usr/bin/env bash
# Build, tests, compute-sanitizer and benchmarks on a machine with a GPU, with one results file. Uses the installed Python,
# which needs a CUDA build of torch, and nvcc; installs nothing and needs no network.
# Variables: RESULTS, the results file; PYTHON; PARTS, the parts to run (builds are kept for the next call); LIMIT, the
# seconds that a section may take. Only torch is required: without tsae's other requirements, the parts that need tsae are
# skipped, and the results say so.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-gpu-results.md}
python=${PYTHON:-python3}
parts=${PARTS:-build tests sanitizer benchmarks}
limit=${LIMIT:-900}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0

architecture=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))') || {
    echo "error: $python has no torch, or its torch sees no GPU (see above). Set PYTHON to use another Python" >&2
    exit 1
}

# section TITLE COMMAND...: runs the command and appends its output to the results; its failure fails the script.
section() {
    local title=$1 begin=$SECONDS code=0
    shift
    echo "== $title"
    { echo; echo "## $title"; echo '```'; } >>"$results"
    timeout --kill-after=10 "$limit" "$@" >>"$results" 2>&1 || code=$?
    [ "$code" -eq 0 ] || status=1
    { echo '```'; echo "exit code $code, $((SECONDS - begin)) s"; } >>"$results"
    echo "   exit code $code, $((SECONDS - begin)) s"
}
wants() { [[ " $parts " == *" $1 "* ]]; }

echo "# GPU results" >"$results"
if wants build; then
    # In place, and by default only for the GPU in this machine: the other architectures take minutes.
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture}
    TSAE_BUILD=cuda section "build for $TORCH_CUDA_ARCH_LIST" "$python" setup.py build_ext --inplace
fi
{
    "$python" - <<'PY'
import platform, torch
print(f"\n- device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
PY
    echo '```'
    "$python" -m tsae_kernels
    echo '```'
} >>"$results" 2>&1
needs_tsae=(tests/sae benchmarks/test_training_step.py benchmarks/test_harvest.py)
if ! why=$("$python" -c 'import tsae.training.trainer, tsae.data.harvest' 2>&1); then
    needs_tsae=()
    echo "skipped: tests/sae and the training-step and harvest benchmarks, because tsae cannot be imported: ${why##*$'\n'}" |
        tee -a "$results"
fi
with_tsae() { [[ " ${needs_tsae[*]-} " == *" $1 "* ]]; }

if wants tests; then
    # In parallel if pytest-xdist is installed, because Triton compiles a kernel for every new set of bands. The tests marked
    # slow emulate on a CPU what the others run on the GPU.
    parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
    for part in tests/tsae_kernels $(with_tsae tests/sae && echo tests/sae); do
        # shellcheck disable=SC2086  # two words
        section "pytest $part" "$python" -m pytest "$part" -m "not slow" -p no:cacheprovider --durations=10 $parallel
    done
fi
if wants sanitizer && ! command -v compute-sanitizer >/dev/null; then
    echo "error: compute-sanitizer is not on the PATH" | tee -a "$results" >&2
    status=1
elif wants sanitizer; then
    # The sanitizer slows kernels by one or two orders of magnitude, so run one small case of each kind of test.
    subset="eight_bands or tuned_bands_in_every_dtype or written or strided or length_cuda"
    files="tests/tsae_kernels/test_kernels_cuda.py"
    for tool in memcheck racecheck initcheck; do
        # PyTorch's caching allocator would hide the bounds of individual tensors from memcheck.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 section "compute-sanitizer --tool $tool" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest $files -k "$subset" -p no:cacheprovider -x
    done
fi
if wants benchmarks; then
    for part in benchmarks/test_kernels.py "${needs_tsae[@]:1}"; do
        section "pytest $part" "$python" -m pytest "$part" -p no:cacheprovider
    done
fi
echo "results in $results"
exit "$status"
