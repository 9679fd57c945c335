#!/usr/bin/env bash
# Checks and measures a build with kernels on a machine with a GPU: no Rust is needed there, only the program (built
# elsewhere by `cargo build --release` beside nvcc) and NVIDIA's driver with cuBLASLt.
#
#   gpu-suite.sh [--quick] [--seconds N] [--device cuda:N] [-o results.json] path/to/mindskip
#
# In this order: what is there; every op against its twin; the same under compute-sanitizer, where it is installed; the
# embedded model's text against the CPU's; its speed, dense and routed; models with random weights; every op by itself;
# PyTorch, where it is installed. One JSON holds it all. Exit code 1 when a check failed; measurements that would begin
# after 8 minutes (--quick: 2, or --seconds) are left out. COMMIT says which one it is where there is no git.
set -uo pipefail

quick=0 seconds= device=cuda out=gpu-results.json program=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --device | --seconds | -o)
      [ $# -gt 1 ] || { echo "gpu-suite.sh: $1 needs a value" >&2; exit 1; }
      case $1 in -o) out=$2 ;; --seconds) seconds=$2 ;; *) device=$2 ;; esac
      shift
      ;;
    -*) echo "gpu-suite.sh: no such option: $1" >&2; exit 1 ;;
    *) program=$1 ;;
  esac
  shift
done
[ -f "$program" ] && [ -x "$program" ] || { echo "gpu-suite.sh: give the program: path/to/mindskip, built with kernels" >&2; exit 1; }
program=$(realpath "$program") # also where it stands in this folder and not on the path

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
parts=()
end=$((SECONDS + ${seconds:-$((quick ? 120 : 480))}))

# Runs a command whose standard output is JSON, an object a line, and keeps it under a name.
part() { # name, command...
  local name=$1 start=$SECONDS rc=0
  shift
  printf '%s ... ' "$name" >&2
  "$@" >"$work/out" 2>"$work/err" || rc=$?
  local state="FAILED ($rc)"
  case $rc in 0) state=ok ;; 124) state="cut off" ;; esac
  printf '%s, %d s\n' "$state" $((SECONDS - start)) >&2
  if [ $rc != 0 ]; then
    [ $rc = 124 ] || failed=1
    tail -n 20 "$work/err" >&2
  fi
  parts+=("\"$name\": {\"exit\": $rc, \"seconds\": $((SECONDS - start)), \"lines\": [$(grep '^{' "$work/out" | paste -sd,)], \
\"errors\": $(tail -n 30 "$work/err" | text)}")
}

# Standard input as a JSON string; what is no UTF-8 is left out.
text() {
  printf '"%s"' "$(iconv -c -f UTF-8 -t UTF-8 | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g' | tr -d '\000-\010\013-\037' |
    sed -z 's/\n$//; s/\n/\\n/g')"
}

part doctor "$program" doctor --json

# Each op in a process of its own, four at a time: one that faults or hangs takes no other with it.
export PROGRAM="$program" DEVICE="$device" EVERY=$([ $quick = 1 ] && echo 7 || echo 1)
ops=$("$program" doctor --json | tr -d ' \n' | grep -o '"ops":\[[^]]*' | cut -d[ -f2 | tr -d '"' | tr , ' ')
[ -n "$ops" ] || { echo "gpu-suite.sh: $program names no ops to verify" >&2; failed=1; }
# shellcheck disable=SC2016,SC2086 # expanded by the shell that it starts; a list of words
printf '%s\n' $ops | xargs -P 4 -I{} sh -c 'timeout 120 "$PROGRAM" doctor --verify --device "$DEVICE" --json \
  --every "$EVERY" --ops {} >"$0/{}.out" 2>"$0/{}.err"; echo $? >"$0/{}.rc"' "$work"
for op in $ops; do
  # One that hangs is no measurement that was cut off.
  # shellcheck disable=SC2016
  part "verify_$op" sh -c 'cat "$0.out"; cat "$0.err" >&2; rc=$(cat "$0.rc"); exit $((rc == 124 ? 1 : rc))' "$work/$op"
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # racecheck does not follow an mbarrier behind __syncwarp, by which attend_hopper orders what one warp clears;
    # scripts/race-check does.
    # shellcheck disable=SC2086
    some=$(printf '%s\n' $ops | grep -vx "$([ $tool = racecheck ] && echo attend)" | paste -sd,)
    # shellcheck disable=SC2016
    part "$tool" sh -c '"$@"; rc=$?; grep -v "Host Frame" "$0" | tail -n 30 >&2; exit $rc' "$work/sanitizer" \
      compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 --log-file "$work/sanitizer" \
      "$program" doctor --verify --device "$device" --json --ops "$some" --every $([ $quick = 1 ] && echo 200 || echo 50)
  done
else
  echo "compute-sanitizer is not installed: memcheck and racecheck are left out" >&2
fi

# In f32 the same tokens; the model's own bf16 on top of it for its speed.
same_text() {
  local prompt="Once upon a time, there was" a b
  a=$("$program" generate "$prompt" -n 100 --device cpu "$@") || return 1
  b=$("$program" generate "$prompt" -n 100 --device "$device" --dtype f32 "$@") || return 1
  [ "$a" = "$b" ] || { printf 'cpu: %s\ngpu: %s\n' "$a" "$b" >&2; return 1; }
}
part text_dense same_text --routers none
part text_routed same_text
part text_keys_active same_text --keys active
for way in "dense --routers none" "routed" "keys_active --keys active"; do
  read -r name options <<<"$way"
  # shellcheck disable=SC2086 # a list of words
  part "speed_$name" "$program" generate "Once upon a time, there was" -n 200 --ignore-eos --json --device "$device" $options
done

# Models with random weights that are made on the GPU, dense and routed in turns; every op by itself; PyTorch, where it is.
# What takes too long is cut off, and no failure.
left() { # seconds at most
  local rest=$((end - SECONDS))
  echo $((rest < 1 ? 1 : rest < $1 ? rest : $1))
}
bench() { # name, seconds at most, options...
  local name=$1 most=$2
  shift 2
  part "bench_$name" timeout "$(left "$most")" "$program" bench "$@" --device "$device" --dtype bf16 --format jsonl
}
if [ $quick = 1 ]; then
  for shape in llama-3-8b smollm2-135m; do
    bench "$shape" 30 --shape $shape --prompt 2048 --gen 32 --reps 2 --granularity attn_token,block_sequence --capacity 0.5
  done
  bench ops_llama-3-8b 20 ops --shape llama-3-8b --rows 1,2048 --context 2048 --reps 3
else
  for shape in llama-3-8b mistral-7b qwen2.5-7b smollm2-135m; do
    bench "$shape" 60 --shape $shape --prompt 2048 --gen 64 --reps 3 --granularity all --keys all,active --capacity 0.5
  done
  bench llama-3-8b_capacity 40 --shape llama-3-8b --prompt 2048 --gen 64 --reps 3
  bench llama-3-8b_deep 40 --shape llama-3-8b --depth 6144 --prompt 1024 --gen 64 --reps 3 --keys all,active --capacity 0.5
  bench llama-3-8b_batch 40 --shape llama-3-8b --batch 8,32 --prompt 128 --gen 64 --reps 3 --capacity 0.5
  for shape in llama-3-8b smollm2-135m; do
    bench "ops_$shape" 30 ops --shape $shape --rows 1,8,64,2048,8192 --context 8192
  done
fi
if [ -f "$(dirname "$0")/compare-torch.py" ] && python3 -c 'import torch' 2>/dev/null; then
  part torch timeout "$(left 60)" "$(dirname "$0")/compare-torch.py" --device "$device" $([ $quick = 1 ] && echo --quick)
else
  echo "torch is not installed: it is not compared with" >&2
fi

{
  printf '{"date": "%s", "command": "%s", "commit": "%s", "gpu": %s, "parts": {' "$(date -u +%FT%TZ)" \
    "gpu-suite.sh --device $device$([ $quick = 1 ] && echo ' --quick')${seconds:+ --seconds $seconds}" \
    "${COMMIT:-$(git -C "$(dirname "$0")" rev-parse --short HEAD 2>/dev/null || echo unknown)}" \
    "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | text)"
  (IFS=,; printf '%s' "${parts[*]}")
  printf '}}\n'
} >"$out.new" && mv "$out.new" "$out"
echo "$out" >&2
exit $failed
