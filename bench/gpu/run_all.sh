#!/usr/bin/env bash
# Build, test, sanitize, benchmark and profile on this machine; what needs a GPU is skipped where there is none.
#
#   bench/gpu/run_all.sh [--budget SECONDS] OUT [build] [tests] [sanitize] [bench] [training] [ncu] [suite]
#
# Default: all parts, in this order. "tests" are the tests that need a GPU; "suite" is all the others, on this machine's
# Python, PyTorch and Triton.
#
# Leaves logs, bench.json, ncu.txt and summary.md in OUT. A part that fails does not stop the next; the exit status is 1
# if any failed. With --budget the whole run ends after that many seconds: the part that is running is stopped, and those
# that follow are skipped.
#
#   LIMIT   seconds after which a single command is stopped (default 540)
#   PYTHON  interpreter (default .venv/bin/python, else python3)
#   TESTS   what the parts "tests" and "suite" choose from (default "tests")
#   BENCH   what the benchmark part runs (default "bench"), e.g. "bench/ops/test_cfg_euler.py --no-compile"
#
# Wheels in .whl/ (pytest-benchmark, pytest-xdist, execnet: for a machine without a network) are used without being
# installed.
set -u -o pipefail

PARTS=(build tests sanitize bench training ncu suite)
usage="usage: run_all.sh [--budget SECONDS] OUT [${PARTS[*]}]"
budget=
if [ "${1:-}" = --budget ]; then
  budget=${2:-}
  [[ $budget =~ ^[0-9]+$ ]] || { echo "$usage" >&2; exit 2; }
  shift 2
fi
[ $# -ge 1 ] || { echo "$usage" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
for part in "$@"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "unknown part $part; $usage" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- "${PARTS[@]}"
cd "$(dirname "$0")/../.." || exit 2

default_python=python3
[ -x .venv/bin/python ] && default_python=.venv/bin/python
python=${PYTHON:-$default_python}
limit=${LIMIT:-540}
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1

if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 2
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

# "90" for compute capability 9.0; empty without a GPU.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")') || exit 2
[ -n "$arch" ] && echo "GPU of compute capability $arch" || echo "no GPU: parts that need one are skipped"

rows=()
failed=0

# run LABEL COMMAND...: under the limit, output to LABEL.log too, outcome into the summary.
run() {
  local label=$1 start=$SECONDS status outcome=passed allowed=$limit left
  shift
  if [ -n "$budget" ]; then
    left=$((budget - SECONDS))
    [ "$left" -gt 0 ] || { skip "$label" "the budget of $budget s is used up"; return; }
    allowed=$(awk -v a="$limit" -v b="$left" 'BEGIN { print (a < b) ? a : b }')
  fi
  echo "== $label: $*"
  timeout --kill-after=10 "$allowed" "$@" 2>&1 | tee "$out/$label.log"
  status=$?
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then
    outcome="stopped after $allowed s"
  elif [ $status -ne 0 ]; then
    outcome="failed (exit $status)"
  fi
  [ $status -eq 0 ] || failed=1
  echo "== $label: $outcome"
  rows+=("| $label | $outcome | $((SECONDS - start)) |")
}

skip() {
  echo "== $1: skipped, $2"
  rows+=("| $1 | skipped: $2 | 0 |")
}

# Whether a part can run that needs a GPU and a program; says so if not.
has() {
  if [ -z "$arch" ]; then
    skip "$1" "no GPU"
  elif ! command -v "$2" >/dev/null; then
    skip "$1" "$2 was not found"
  else
    return 0
  fi
  return 1
}

build() {
  local cuda=auto
  [ -n "$arch" ] && compgen -G "csrc/cuda/*.cu" >/dev/null && cuda=1
  MSDD_FAST_BUILD_EXT=1 MSDD_FAST_BUILD_CUDA=$cuda MSDD_FAST_CUDA_ARCHS=${arch:-80;90} \
    run build "$python" -m pip install -v --disable-pip-version-check --no-build-isolation --no-deps -e .
}

# marked LABEL MARKS: the tests with these marks; with xdist in one process for every two cores.
marked() {
  local workers=$(($(nproc) / 2)) parallel=()
  if [ "$workers" -gt 1 ] && "$python" -c "import xdist" 2>/dev/null; then
    parallel=(-n "$workers" --dist worksteal)
    local -x OMP_NUM_THREADS=2
  fi
  run "$1" "$python" -m pytest -q -rs "${parallel[@]}" -m "$2" ${TESTS:-tests}
}

tests() {
  if [ -n "$arch" ]; then
    marked tests gpu
  else
    skip tests "no GPU"
  fi
}

suite() {
  marked suite "not gpu and not slow"
}

# The comparisons of tests/ops are the small shapes: odd sizes, tails, strides. Without PyTorch's caching allocator,
# since inside its large blocks memcheck cannot see an access out of bounds.
sanitize() {
  local tool limit=$((limit / 2))
  for tool in memcheck racecheck; do
    has "$tool" compute-sanitizer || continue
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 \
      --report-api-errors no "$python" -m pytest -q -m gpu -p no:cacheprovider tests/ops
  done
}

bench() {
  rm -f "$out/bench.json"
  run bench "$python" -m pytest -q -rs -p no:cacheprovider ${BENCH:-bench} --benchmark-json="$out/bench.json"
}

# img/s, fraction of a large product and memory of stage-1 training, by batch.
training() {
  local preset
  for preset in msdd-d12-joint msdd-d12; do
    if [ -z "$arch" ]; then
      skip "training-$preset" "no GPU"
    else
      run "training-$preset" "$python" -m msdd_fast.bench.training measure --preset "$preset" \
        --batch-size 32 64 128 256 --json "$out/training-$preset.json"
    fi
  done
}

# Every kernel of ours by name, launched by the benchmarks at 256 px in bfloat16. The clocks are left alone.
ncu_pass() {
  local names
  has ncu ncu || return
  names=$({ grep -oh 'def [a-z0-9_]*_kernel' kernels/*.py | cut -d' ' -f2
            grep -ohs '__global__[^(]*' csrc/cuda/*.cu | grep -o '[A-Za-z0-9_]*$'; } | sort -u | paste -sd'|')
  run ncu ncu --clock-control none --target-processes all --kernel-name "regex:^($names)$" --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats --section WarpStateStats \
    --log-file "$out/ncu.txt" "$python" -m pytest -q -p no:cacheprovider bench --scales 256 --dtypes bf16 \
    --rounds 1 --no-compile
}

for part in "$@"; do
  case $part in
    ncu) ncu_pass ;;
    *) $part ;;
  esac
done

{
  printf '| part | outcome | seconds |\n|---|---|---|\n'
  printf '%s\n' "${rows[@]}"
  if [[ " $* " == *" bench "* && -s $out/bench.json ]]; then
    echo
    "$python" -m msdd_fast.bench.report.op_table "$out/bench.json"
  fi
} >"$out/summary.md"
cat "$out/summary.md"
exit $failed
