#!/usr/bin/env bash
# All that a GPU can say about this package, in under ten minutes, from a fresh clone.
# shellcheck disable=SC2329 # step runs the functions by their names
set -u

usage() {
  cat <<'TEXT'
bash bench/tools/gpu_check.sh [--python EXE] [--out DIR] [--seconds N] [--dry-run]

Installs the package, runs its tests on the GPU with both backends, races it eagerly and in CUDA graphs, has
compute-sanitizer watch small cases, and tunes. A step that fails or runs out of time stops none of those after it.
The exit status is 0 where every step passed, and 1 otherwise.

  --python EXE   the Python to install into and to run; default python3. It must have a CUDA build of PyTorch, Triton,
                 setuptools 77, numpy, safetensors, tqdm, hypothesis, pytest, pytest-benchmark, tokenizers, peft and
                 transformers. Nothing is downloaded. A C++ compiler and nvcc of that PyTorch's CUDA must be there too.
  --out DIR      where summary.txt, log.txt, the races' results and the tuned table go; default build/gpu-check
  --seconds N    the limits of all steps together; default 590
  --dry-run      runs every step on a machine without a GPU, with a stub for whatever needs one

No step takes longer than its own limit and what the steps before it have left of theirs.
TEXT
}

DEFAULT_SECONDS=590
SKIPPED=77
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3
out=$root/build/gpu-check
dry_run=""
seconds=$DEFAULT_SECONDS
while (($#)); do
  case $1 in
    --python) python=${2:?--python needs a value} && shift 2 ;;
    --out) out=${2:?--out needs a value} && shift 2 ;;
    --seconds) seconds=${2:?--seconds needs a value} && shift 2 ;;
    --dry-run) dry_run=yes && shift ;;
    --help | -h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
jobs=$(($(getconf _NPROCESSORS_ONLN) / 2))
jobs=$((jobs < 1 ? 1 : jobs > 8 ? 8 : jobs))
parts=$(mktemp -d) || exit 2
trap 'rm -rf "$parts"' EXIT
export python out dry_run jobs parts SKIPPED
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
log=$out/log.txt summary=$out/summary.txt
allowed=0 failed=0
: >"$log"

# step NAME SECONDS FUNCTION ARGUMENTS...: what earlier steps have left of their seconds is added to these.
step() {
  local name=$1 began=$SECONDS limit status verdict
  allowed=$((allowed + $2))
  limit=$((allowed * seconds / DEFAULT_SECONDS - SECONDS))
  limit=$((limit < 1 ? 1 : limit))
  shift 2
  printf '\n=== %s, at most %d s: %s\n' "$name" "$limit" "$*" | tee -a "$log"
  timeout --kill-after=5 "$limit" bash -c '"$@"' gpu_check "$@" >>"$log" 2>&1
  status=$?
  cat "$parts"/* >>"$log" 2>/dev/null
  rm -f "$parts"/*
  case $status in
    0) verdict=passed${dry_run:+, dry run} ;;
    "$SKIPPED") verdict="skipped: $(tail -n 1 "$log")" ;;
    124 | 137) verdict="RAN OUT OF TIME" ;;
    *) verdict="FAILED with status $status" ;;
  esac
  case $status in 0 | "$SKIPPED") ;; *) failed=1 && tail -n 15 "$log" ;; esac
  printf '%-20s %4d s of %3d  %s\n' "$name" "$((SECONDS - began))" "$limit" "$verdict" | tee -a "$summary"
}

header() {
  [[ -z $dry_run ]] || echo "dry run: whatever needs a GPU is a stub, and the figures mean nothing"
  date -u +"%Y-%m-%d %H:%M UTC"
  echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  "$python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
  echo
}

install() {
  local options=(-e . --no-build-isolation --no-deps --no-index --disable-pip-version-check)
  if [[ -n $dry_run ]]; then
    echo "dry run: pip only says what it would install"
    "$python" -m pip install --dry-run "${options[@]}"
  else
    ROSA_KERNELS_BUILD=cuda "$python" -m pip install "${options[@]}"
  fi
}

backends() {
  "$python" -m rosa_kernels || return
  if [[ -n $dry_run ]]; then
    echo "dry run: a stub for the check that the GPU's backends run"
  else
    "$python" -c 'import rosa_kernels as rk, sys
missing = {name: rk.available_backends()[name] for name in ("triton", "cuda")}
sys.exit("\n".join(f"{name}: {reason}" for name, reason in missing.items() if reason) or 0)'
  fi
}

# gpu_tests PROCESSES PATH OPTIONS...: pytest's GPU tests, shared among so many processes, as Triton compiles on one core.
gpu_tests() {
  local count=$1 part worst=0 processes=() options=(-m gpu -q -rs -p no:cacheprovider)
  shift
  if [[ -n $dry_run ]]; then
    echo "dry run: a stub that only collects"
    "$python" -m pytest tests/ops/test_gpu.py tests/adapters/test_graph_recorder.py "${options[@]}" --collect-only
    return
  fi
  for ((part = 0; part < count; part++)); do
    "$python" -m pytest "${options[@]}" --part "$part/$count" "$@" >"$parts/$part" 2>&1 &
    processes+=($!)
  done
  for part in "${processes[@]}"; do wait "$part" || worst=$?; done
  return "$worst"
}

races() {
  local options=(bench/races/test_gpu_speed.py -q -p no:cacheprovider --benchmark-only --results "$out/results")
  if [[ -n $dry_run ]]; then
    "$python" -m pytest "${options[@]}" --gpu-dry-run -k "csr_add or lora_forward"
  else
    ROSA_KERNELS_BACKEND=$1 "$python" -m pytest "${options[@]}" --device gpu --shapes selected
  fi
}

# sanitized TOOL BACKENDS OPTIONS...: without PyTorch's caching each tensor ends where its memory does.
sanitized() {
  local tool=$1 backends=$2
  shift 2
  if [[ -n $dry_run ]]; then
    echo "dry run: a stub for compute-sanitizer --tool $tool, with the cases on the CPU"
    "$python" bench/tools/gpu_small_cases.py --device cpu --backends cpu
  elif ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not found"
    return "$SKIPPED"
  else
    # shellcheck disable=SC2086 # the backends' names are separate words
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" \
      "$python" bench/tools/gpu_small_cases.py --backends $backends
  fi
}

host_time() {
  if [[ ! -f bench/tools/gpu_host_time.py ]]; then
    echo "bench/tools/gpu_host_time.py is not there"
    return "$SKIPPED"
  fi
  local options=(--only "lora bf16 " --only "rows bf16 ") # every case takes three minutes
  [[ -z $dry_run ]] || options=(--only "lora bf16 cuda" --quick)
  "$python" bench/tools/gpu_host_time.py --json "$out/host-time.json" "${options[@]}"
}

tune() {
  if [[ -n $dry_run ]]; then
    echo "dry run: a stub for python -m rosa_kernels.tune, which only prints its options"
    "$python" -m rosa_kernels.tune --help
  else
    ROSA_KERNELS_TUNED=$out/tuned "$python" -m rosa_kernels.tune
  fi
}
export -f install backends gpu_tests races sanitized host_time tune

header 2>&1 | tee "$summary"
step install 100 install
step backends 15 backends
step tests-triton 110 gpu_tests "$jobs" tests -k "triton and not 2_to_the_31"
step tests-cuda 45 gpu_tests "$jobs" tests -k "not triton and not 2_to_the_31"
step tests-large 25 gpu_tests 1 tests/ops/test_gpu.py -k "2_to_the_31"
step races-triton 70 races triton
step races-cuda 45 races cuda
step memcheck 30 sanitized memcheck "triton cuda"
step racecheck-cuda 20 sanitized racecheck cuda --kernel-name kns=rosa
step racecheck-triton 20 sanitized racecheck triton --kernel-name kns=_kernel
step initcheck-cuda 20 sanitized initcheck cuda --kernel-name kns=rosa
step host-time 30 host_time
step tune 60 tune

{
  echo
  ((failed)) && echo "not every step passed" || echo "every step passed"
  echo "whole: $SECONDS s; the steps' output: $log"
  [[ ! -d $out/results ]] || echo "races: $(echo "$out"/results/*.json)"
} | tee -a "$summary"
exit "$failed"
