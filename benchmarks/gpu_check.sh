#!/usr/bin/env bash
# On a machine with a GPU: tests and benchmarks in one go, one results file. Uses the Python that is there (its torch
# has the GPU build) and installs nothing. RESULTS=FILE chooses where the results go.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-gpu-results.md}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0
{
    echo "# GPU results"
    "$python" - <<'PY'
import platform, torch
print(f"\n- device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
PY
    "$python" -m tsae_kernels
} >"$results" 2>&1
for part in "tests/tsae_kernels" "tests/sae" "benchmarks"; do
    { echo; echo "## pytest $part"; echo '```'; } >>"$results"
    "$python" -m pytest "$part" -p no:cacheprovider >>"$results" 2>&1 || status=1
    echo '```' >>"$results"
done
if command -v compute-sanitizer >/dev/null; then
    { echo; echo "## compute-sanitizer"; echo '```'; } >>"$results"
    compute-sanitizer --error-exitcode 9 "$python" -m pytest tests/tsae_kernels -m gpu -p no:cacheprovider >>"$results" 2>&1
    code=$?
    [ "$code" -eq 0 ] || [ "$code" -eq 5 ] || status=1 # 5: there is no GPU test yet
    echo '```' >>"$results"
fi
echo "results in $results"
exit "$status"
