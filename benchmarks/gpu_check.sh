#!/usr/bin/env bash
# On a machine with a GPU: build, tests, compute-sanitizer and benchmarks in one go, one results file. Uses the Python
# that is there (its torch has the GPU build and its CUDA toolkit has nvcc), installs nothing and needs no network.
# RESULTS=FILE chooses where the results go, PARTS which parts run (what is built stays for the next call), LIMIT how many
# seconds a section may take. tsae_kernels needs torch alone; where tsae's requirements are missing, what needs tsae is
# left out, and the results say so.
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
    echo "error: $python has no torch, or its torch sees no GPU (see above); PYTHON=... chooses another" >&2
    exit 1
}

# section TITLE COMMAND...: runs it, its output into the results; a failure fails the whole.
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
    # In place, and only for the GPU that is here unless asked otherwise: the other architectures would cost minutes.
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
    echo "left out: tests/sae, the training step and the harvest, because tsae cannot be imported: ${why##*$'\n'}" |
        tee -a "$results"
fi
with_tsae() { [[ " ${needs_tsae[*]-} " == *" $1 "* ]]; }

if wants tests; then
    # In several processes where pytest-xdist is there: Triton compiles a kernel for every new set of bands. The slow
    # tests are those that do without a GPU what the others do on one.
    parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
    for part in tests/tsae_kernels $(with_tsae tests/sae && echo tests/sae); do
        # shellcheck disable=SC2086  # two words
        section "pytest $part" "$python" -m pytest "$part" -m "not slow" -p no:cacheprovider --durations=10 $parallel
    done
fi
if wants sanitizer && ! command -v compute-sanitizer >/dev/null; then
    echo "error: there is no compute-sanitizer on the PATH" | tee -a "$results" >&2
    status=1
elif wants sanitizer; then
    # A checked kernel is slower by one or two orders of magnitude: of each kind of test one small case.
    subset="eight_bands or tuned_bands_in_every_dtype or written or strided or length_cuda"
    files="tests/tsae_kernels/test_kernels_cuda.py"
    for tool in memcheck racecheck initcheck; do
        # PyTorch's caching allocator would hide the ends of single tensors from memcheck.
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
