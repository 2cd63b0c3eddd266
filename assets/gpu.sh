#!/usr/bin/env bash
# The first minutes on a CUDA GPU: does it compute what a CPU does, and what does it cost?
#
#     OUT=results bash assets/gpu.sh                    # within eight minutes, without network
#     OUT=results QUICK=1 bash assets/gpu.sh            # toy sizes, also on a CPU: does it run?
#     OUT=results bash assets/gpu.sh suites smollm2 --model DIR --data TRAIN.jsonl --tasks TASKS
#
# It needs python3 with torch, transformers, peft, tqdm, pandas, safetensors, pytest and scipy. Where
# something is missing, WHEELS=DIR installs it from a folder of wheels. Each step has a time limit
# and a log in $OUT, and a step that fails does not stop the others. The last lines are a table.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
QUICK=${QUICK:-0}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
table="| step | result | seconds |"$'\n'"|---|---|---|"

step() {                                 # step NAME LIMIT COMMAND...
    local name=$1 limit=$2 start=$SECONDS result
    shift 2
    echo "== $name" >&2
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    case $? in
        0) result=done ;;
        124) result="stopped after $limit s" ;;
        *) result="failed: $(grep -v '^$' "$OUT/$name.log" | tail -1 | cut -c1-60)" ;;
    esac
    table+=$'\n'"| $name | $result | $((SECONDS - start)) |"
}

if [ -n "${WHEELS:-}" ]; then
    step wheels 60 python3 -m pip install --no-index --find-links "$WHEELS" -r requirements.txt peft \
        pytest scipy
fi
if [ "${1:-}" = suites ]; then           # what takes an hour on a CPU
    shift
    step "$1" 560 python3 assets/experiments.py "$@"
    cp "assets/$1.json" "$OUT/"
    step report 60 python3 assets/experiments.py report
    tail -n +1 "$OUT/report.log"
else
    tests="" size="" tiny="" random="--max-steps 10 --calibration-samples 64 --calibration-max-tokens 256"
    if [ "$QUICK" = 1 ]; then
        tests="--collect-only" size="--quick"
        tiny="--max-steps 2 --max-samples 32 --calibration-samples 4 --calibration-max-tokens 40"
        tiny="$tiny --task-samples 8 --eval-samples 4 --tasks nll=tiny/test.jsonl,drift"
        random="--max-steps 2 --max-samples 32 --batch-size 4 --calibration-samples 4 --rank 8"
        random="$random --calibration-max-tokens 40 --task-samples 4 --max-length 256"
    fi
    step tests 150 python3 -m pytest -q -p no:cacheprovider test_folora.py $tests \
        -k on_this_device
    step tiny 150 python3 train_math.py $tiny --out "$OUT/tiny-run"
    step costs 240 python3 assets/bench.py --gpu $size --out "$OUT/gpu.json" \
        --random-checkpoint "$OUT/random"
    step end-to-end 120 python3 train_math.py --model "$OUT/random" --data tiny/train.jsonl \
        --tasks nll=tiny/test.jsonl,drift --eval-samples 8 $random --out "$OUT/random-run"
    rm -rf "$OUT/random" "$OUT"/*-run/{adapter,prepared.pt,checkpoint.pt}
    grep -h "^|" "$OUT/costs.log"
fi
echo
echo "$table"
