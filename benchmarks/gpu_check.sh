#!/usr/bin/env bash
# On a machine with a GPU: builds the compiled part in place, runs the GPU tests, the whole suite and the benchmarks,
# all within nine minutes, and writes JSON under benchmarks/results/<gpu>/. Works offline from a plain checkout.
#
#   bash benchmarks/gpu_check.sh [FOLDER]     FOLDER: where results go instead
#   PYTHON=/path/to/python                    the interpreter to use instead of `python`
#
# Exit code: 0 all stages passed, 1 a stage failed or ran out of time, 2 no GPU that torch can use.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

readonly LIMIT=530 # seconds for everything; every stage has a limit of its own too
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET # kernels run on the GPU here, not in the interpreter

if ! probe=$("$PYTHON" -c '
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no usable GPU")
name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
print("GPU", slug, "{}{}".format(*capability), torch.__version__, name, sep="\t")
' 2>&1); then
    echo "gpu_check: nothing was run: $(tail -n 1 <<<"$probe")"
    exit 2
fi
IFS=$'\t' read -r _ slug capability torch_version gpu < <(grep $'^GPU\t' <<<"$probe")

results=${1:-benchmarks/results/$slug}
mkdir -p "$results" || exit 1
log=$results/gpu_check.log
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
: >"$log"
failed=0

# seconds_for MOST: MOST, or what is left of the whole limit
seconds_for() {
    local left=$((LIMIT - SECONDS))
    if ((left < 1)); then left=1; fi
    echo $((left < $1 ? left : $1))
}

# record NAME CODE SECONDS OUTPUT: a line on the screen and in the summary; the output's end when the stage failed
record() {
    local name=$1 code=$2 seconds=$3 output=$4 status=passed last
    if ((code == 124 || code == 137)); then
        status="out of time"
    elif ((code != 0)); then
        status="failed ($code)"
    fi
    last=$(grep -v '^[[:space:]]*$' "$output" | tail -n 1 | tr '\t' ' ' | cut -c 1-200)
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$seconds" "$last" >>"$scratch/stages.tsv"
    printf '%-12s %-12s %4s s  %s\n' "$name" "$status" "$seconds" "$last"
    { printf '\n===== %s: %s\n' "$name" "$status" && cat "$output"; } >>"$log"
    if [[ $status != passed ]]; then
        failed=1
        tail -n 40 "$output" | sed 's/^/    /'
    fi
}

# stage NAME MOST COMMAND...
stage() {
    local name=$1 most=$2 begin=$SECONDS code
    shift 2
    timeout --kill-after=5 "$(seconds_for "$most")" "$@" >"$scratch/$name.txt" 2>&1
    code=$?
    record "$name" "$code" "$((SECONDS - begin))" "$scratch/$name.txt"
}

# suite MOST: one process for each file of tests, as many at a time as there are cores, since most tests use one core
suite() {
    local begin=$SECONDS deadline file name code output worst=0 workers
    deadline=$((SECONDS + $(seconds_for "$1")))
    workers=$(nproc)
    while IFS= read -r file; do
        while (($(jobs -rp | wc -l) >= workers)); do wait -n; done
        name=${file//\//.}
        (
            left=$((deadline - SECONDS))
            OMP_NUM_THREADS=2 timeout --kill-after=5 "$((left > 1 ? left : 1))" \
                "$PYTHON" -m pytest -q -m "not gpu" -p no:cacheprovider "$file" >"$scratch/suite_$name.txt" 2>&1
            echo "$?" >"$scratch/suite_$name.code"
        ) &
    done < <(find tests -name 'test_*.py' | sort)
    wait
    for output in "$scratch"/suite_*.txt; do
        code=$(cat "${output%.txt}.code" 2>/dev/null || echo 137)
        if ((code == 5)); then code=0; fi # pytest: nothing to run, all of them need the GPU
        if ((code != 0)); then
            worst=1
            name=$(basename "$output" .txt)
            record "${name#suite_}" "$code" "$((SECONDS - begin))" "$output"
        fi
        tail -n 1 "$output" >>"$scratch/totals.txt"
    done
    grep -oE '[0-9]+ (passed|failed|skipped|deselected|errors?)' "$scratch/totals.txt" |
        awk '{ n[$2] += $1 } END { for (k in n) printf "%d %s  ", n[k], k; print "" }' >"$scratch/suite.txt"
    record suite "$worst" "$((SECONDS - begin))" "$scratch/suite.txt"
}

echo "gpu_check: $gpu, $(nproc) cores, torch $torch_version; results in $results"
export FASTMIM_EXTENSION=required FASTMIM_CUDA_ARCHITECTURES=$capability
stage build 150 "$PYTHON" setup.py build_ext --inplace
stage info 60 "$PYTHON" -m fastmim.info
stage gpu_tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests
suite 200
stage ops 80 "$PYTHON" -m benchmarks.ops --device cuda --dtype fp32 bf16 --seconds-per-case 0.3 \
    --json "$results/ops.json"
stage throughput 110 "$PYTHON" -m benchmarks.throughput --device cuda --model vit_base_patch16_224 resnet50 \
    --precision bf16 --steps 10 --json "$results/throughput.json"
stage pieces 50 "$PYTHON" -m benchmarks.throughput --device cuda --methods mae --batch_size 64 --precision bf16 \
    --model vit_small_patch16_224 vit_base_patch16_224 --steps 10 --ablate --json "$results/pieces.json"
stage compiled 60 "$PYTHON" -m benchmarks.throughput --device cuda --methods mae --model vit_base_patch16_224 \
    --precision bf16 --steps 10 --baseline-compile --json "$results/compiled.json"
if ! "$PYTHON" -c 'import nvidia.dali' >/dev/null 2>&1; then
    echo "data         skipped: DALI is not installed (its GPU tests were skipped, too)"
elif ((LIMIT - SECONDS < 30)); then
    echo "data         skipped: no time is left"
else
    stage data 70 "$PYTHON" -m benchmarks.data --device cuda --workers "$(nproc)" --outputs uint8 --rounds 2 \
        --seconds-per-sample 0.5 --json "$results/data.json"
fi

"$PYTHON" - "$scratch/stages.tsv" "$results/check.json" "$SECONDS" "$gpu" "$torch_version" <<'PYTHON' || failed=1
import json, os, sys

stages, target, seconds, gpu, torch_version = sys.argv[1:]
rows = [line.rstrip("\n").split("\t") for line in open(stages)]
summary = {
    "gpu": gpu,
    "torch": torch_version,
    "seconds": int(seconds),
    "passed": all(row[1] == "passed" for row in rows),
    "stages": [{"stage": r[0], "status": r[1], "seconds": int(r[2]), "last_line": r[3]} for r in rows],
}
with open(target + ".tmp", "w") as out:
    json.dump(summary, out, indent=1)
os.replace(target + ".tmp", target)
PYTHON

if ((failed)); then
    echo "gpu_check: FAILED after $SECONDS s; everything that was printed is in $log"
    exit 1
fi
echo "gpu_check: passed in $SECONDS s; results in $results"
