#!/usr/bin/env bash
# Everything that a GPU machine is needed for, in under nine minutes (then it stops) and without a network: builds, runs the GPU tests
# and compute-sanitizer on a short list, measures the ceilings, the ops and the ladder of rivals, and writes CSV files and
# a one-page summary.
#
#     benchmarks/gpu.sh [--dry-run] [STEP...]     # steps: build tests sanitizer ceilings ladder noise group_norm delta
#
# --dry-run      no GPU and no build: the installed guda_fast, small shapes, Triton's interpreter
# OUT            where the results go; default build/gpu, or build/gpu-dry. Only what the steps make again is replaced
# PYTHON         one that has torch with CUDA, triton, pybind11, scikit-build-core, cmake, ninja and what guda_fast
#                imports (numpy, pillow, safetensors, tqdm, typer); default .venv/bin/python, or python3 without it
# GUDA_FAST_COMMIT   the commit for the rows, where the tree has no git
# What needs pytest, hypothesis, diffusers, peft or compute-sanitizer is left out, and named, where that is not
# installed. The ladder compiles whole networks, and measures as many of its cases as there is time for.
# Measuring needs the step tests to have passed, in this call or in an earlier one since the build.
# A step that fails or runs out of time ends neither the others nor the summary; the exit status says so.
set -uo pipefail
[[ -z "${OUT:-}" || "$OUT" == /* ]] || OUT="$PWD/$OUT"
cd "$(dirname "$0")/.."

budget=530
all_steps=(build tests sanitizer ceilings ladder noise group_norm delta)
declare -A limits=([build]=150 [tests]=150 [sanitizer]=75 [ceilings]=30 [noise]=120 [group_norm]=90 [delta]=60 [ladder]=240)
declare -A measured=([ceilings]=gpu_ceilings [noise]=gpu_noise_ops [group_norm]=gpu_group_norm_silu [delta]=gpu_delta_ops
  [ladder]=gpu_ladder)

dry_run=0 one=""
steps=()
while (($#)); do
  case "$1" in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
    --one) one="${2:?--one needs a step}" && shift ;; # how this script calls itself for each step, under a time limit
    *)
      [[ " ${all_steps[*]} " == *" $1 "* ]] || { echo "gpu.sh: steps are ${all_steps[*]}, got $1" >&2 && exit 2; }
      steps+=("$1")
      ;;
  esac
  shift
done
((${#steps[@]})) || steps=("${all_steps[@]}")

python="${PYTHON:-}"
[[ -n "$python" || ! -x .venv/bin/python ]] || python="$PWD/.venv/bin/python"
export PYTHON="${python:-python3}"
python="$PYTHON"
work="$PWD/build/gpu-work"
if ((dry_run)); then
  export OUT="${OUT:-$PWD/build/gpu-dry}" TRITON_INTERPRET=1
  work="$PWD/build/gpu-dry-work"
elif [[ -x "$work/venv/bin/python" ]]; then
  python="$work/venv/bin/python"
fi

export OUT="${OUT:-$PWD/build/gpu}"

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

has diffusers || unset "measured[ladder]"
ladder() { echo "left out: diffusers is not installed"; }

# A virtual environment of a virtual environment does not see the latter's packages: a .pth file names them.
build() {
  if ((dry_run)); then echo "left out: a dry run uses what is installed" && return; fi
  local base="$PYTHON" own capability
  rm -rf "$work/venv" "$work"/green-*
  "$base" -m venv --without-pip "$work/venv" || return
  own=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  "$base" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    >"$own/base.pth" || return
  capability=$("$base" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  # -real: machine code for this GPU and nothing else.
  GUDA_FAST_CUDA=ON "$work/venv/bin/python" -m pip install -v --no-index --no-deps --no-build-isolation \
    -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$capability-real" -C build.verbose=true -e . >"$OUT/build.log" 2>&1 ||
    { tail -n 40 "$OUT/build.log" && return 1; }
  grep -E "warning:|[1-9][0-9]* bytes spill" "$OUT/build.log" | sort | uniq -c | sort -rn | head -n 20
  "$work/venv/bin/python" -c 'import guda_fast; print(guda_fast.build_config())'
}

# All at once, since tests leave the GPU idle most of the time; what is red is not measured.
tests() {
  local name status=0 pids=() names=("${measured[@]}")
  rm -f "$work"/green-*
  if ! has pytest; then
    echo "left out: pytest is not installed; benchmarks.gpu_check alone decides what is measured"
    "$python" -m benchmarks.gpu_check || return
    for name in "${measured[@]}"; do touch "$work/green-$name"; done
    return
  fi
  # Warnings are errors where constraints.txt pins what could warn; here it does not.
  export PYTEST_ADDOPTS="-p no:cacheprovider -o filterwarnings=default"
  if ((dry_run)); then
    PYTEST_ADDOPTS+=" --collect-only -q"
    names=(gpu_ceilings)
    for name in "${measured[@]}"; do touch "$work/green-$name"; done
    rm "$work/green-gpu_ceilings"
  fi
  for name in "${names[@]}"; do
    ("$python" -m benchmarks test "$name" >"$work/tests-$name.log" 2>&1 && touch "$work/green-$name") &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  for name in "${names[@]}"; do
    echo "$name: $([[ -e "$work/green-$name" ]] && echo green || echo RED)"
    grep "left out" "$work/tests-$name.log"
    tail -n "$([[ -e "$work/green-$name" ]] && echo 1 || echo 40)" "$work/tests-$name.log"
  done
  return "$status"
}

sanitizer() {
  if ((dry_run)); then
    "$python" -m benchmarks.gpu_check
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then echo "left out: compute-sanitizer is not installed" && return; fi
  # Without torch's pool of memory each tensor is an allocation, whose ends the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.gpu_check &&
    compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m benchmarks.gpu_check
}

measure() {
  local name="$1" options=()
  if [[ ! -e "$work/green-$name" ]]; then echo "not measured: the tests of $name did not pass" && return 1; fi
  if ((dry_run)); then options=(--device cpu --quick --repetitions 3); fi
  "$python" -m benchmarks run "$name" --tested --out "$OUT" "${options[@]}"
}

if [[ -n "$one" ]]; then
  if [[ -n "${measured[$one]:-}" ]]; then measure "${measured[$one]}"; else "$one"; fi
  exit
fi

has torch && has typer || { echo "gpu.sh: $python must have torch and typer (PYTHON names another)" >&2 && exit 2; }
mkdir -p "$OUT" "$work"
rm -f "$OUT"/{steps.tsv,log.txt,summary.md}
for name in "${steps[@]}"; do
  [[ -z "${measured[$name]:-}" ]] || rm -f "$OUT/${measured[$name]}".{csv,partial}
done
failed=0 again=(--one)
((dry_run)) && again=(--dry-run --one)
for name in "${steps[@]}"; do
  left=$((budget - SECONDS)) started=$SECONDS
  limit=$((limits[$name] < left ? limits[$name] : left))
  # A CPU may be any number of times slower.
  ((dry_run)) && limit=600
  printf '\n[gpu %3d s] %s\n' "$SECONDS" "$name"
  if ((limit <= 0)); then
    outcome="no time left"
  else
    timeout --kill-after=5 "$limit" bash "$0" "${again[@]}" "$name" 2>&1
    case $? in 0) outcome=ok ;; 124 | 137) outcome="stopped after $limit s" ;; *) outcome=FAILED ;; esac
  fi
  [[ $outcome == ok ]] || failed=1
  printf '%s\t%s\t%d\n' "$name" "$outcome" "$((SECONDS - started))" >>"$OUT/steps.tsv"
done > >(tee "$OUT/log.txt")
"$python" -m benchmarks summary "$OUT" >"$OUT/summary.md" || failed=1
printf '\n[gpu %3d s] %s\n' "$SECONDS" "$OUT/summary.md"
exit "$failed"
