#!/usr/bin/env bash
# What to run first on a rented GPU, in order; docs/imagenet.md tells how to read what comes out.

set -uo pipefail
CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=benchmarks/first_gpu_hour_steps.sh
source benchmarks/first_gpu_hour_steps.sh

usage() {
    cat <<'TEXT'
usage: bash benchmarks/first_gpu_hour.sh [--cpu] [--output DIR] [--patience N] [--only STEP...] [--redo STEP...]
       bash benchmarks/first_gpu_hour.sh --list | --help

Runs its steps one after another, each under a time limit and with a log. A second call skips what ended well and
repeats what failed, was stopped, or ran over its limit. The steps on a GPU take about an hour, most of it compiling.

  --only STEP...  these steps alone
  --redo STEP...  run these again although they ended well, and with them the steps that build on them
  --output DIR    logs, figures and runs (runs/first-gpu-hour; with --cpu runs/first-gpu-hour-cpu)
  --patience N    multiplies all time limits (1)
  --cpu           the same in a small form that needs no GPU, to try the script: nothing that it measures is worth keeping
  --list          the steps, what they need and what they answer

The interpreter is .venv/bin/python where that is there, else python3; PYTHON=... names another one.
Exit code 0: all that could run ended well. 1: something did not, or no step can run here. 2: wrong arguments.
TEXT
}

refuse() {
    echo "error: $1" >&2
    exit 2
}

ALL="" # names of the steps
for row in "${STEPS[@]}"; do ALL+="${row%% *} "; done

among() { # NAME NAME...
    local first=$1
    shift
    [[ " $* " == *" $first "* ]]
}

# ---- arguments

CPU=false OUTPUT="" PATIENCE=1 LIST=false ONLY=() REDO=()
while (($#)); do
    option=$1
    shift
    case $option in
    --cpu) CPU=true ;;
    --list) LIST=true ;;
    --help | -h) usage && exit 0 ;;
    --output | --patience)
        (($#)) || refuse "$option needs a value; --help tells more"
        if [[ $option == --output ]]; then OUTPUT=$1; else PATIENCE=$1; fi
        shift
        ;;
    --only | --redo)
        [[ ${1:---} != --* ]] || refuse "$option needs a step; allowed are $ALL"
        while (($#)) && [[ $1 != --* ]]; do
            among "$1" "$ALL" || refuse "step '$1' is unknown; allowed are $ALL"
            if [[ $option == --only ]]; then ONLY+=("$1"); else REDO+=("$1"); fi
            shift
        done
        ;;
    *) refuse "'$option' is unknown; allowed are --cpu, --output, --patience, --only, --redo, --list and --help" ;;
    esac
done
[[ $PATIENCE =~ ^[0-9]*\.?[0-9]+$ && $PATIENCE =~ [1-9] ]] || refuse "patience '$PATIENCE'; give a number above 0, as 2"
if $LIST; then
    for row in "${STEPS[@]}"; do
        read -r name gpu_minutes cpu_minutes needs after what <<<"$row"
        printf '%-24s %3s min  needs %-26s %s\n' "$name" "$gpu_minutes" "$needs" "$what"
    done
    exit 0
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
elif [[ $PYTHON == */* ]]; then
    PYTHON=$(cd "$CALLED_FROM" && realpath -s "$PYTHON") # links stay: an environment's python is one
fi
FORM=gpu
if $CPU; then
    FORM=cpu
    export CUDA_VISIBLE_DEVICES="" # a GPU that is there stays out of it
fi
OUTPUT=$(cd "$CALLED_FROM" && realpath -m "${OUTPUT:-runs/first-gpu-hour$($CPU && echo -cpu)}")
mkdir -p "$OUTPUT" || refuse "$OUTPUT cannot be written; choose another --output"
[[ $(cat "$OUTPUT/form" 2>/dev/null || echo $FORM) == "$FORM" ]] ||
    refuse "$OUTPUT holds figures of the other form, with or without --cpu; choose another --output"
echo $FORM >"$OUTPUT/form"

# ---- what is there

declare -A THERE=() WHY=()
echo "What is here:"
"$PYTHON" benchmarks/machine_check.py --place "$OUTPUT" --output "$OUTPUT/machine.tsv" || {
    echo "error: $PYTHON cannot look at this machine; 'make env' makes .venv, PYTHON=... names another interpreter" >&2
    exit 1
}
while IFS=$'\t' read -r name there what; do
    THERE[$name]=$there WHY[$name]=$what
done <"$OUTPUT/machine.tsv"
if [[ ${THERE[tensorrt-rtx]:-no} == yes ]]; then THERE[tensorrt]=yes; fi # a step needs one of the two
if $CPU; then THERE[gpu]=no WHY[gpu]="--cpu runs without one"; fi
for need in python torch disk $($CPU || echo gpu); do
    [[ ${THERE[$need]:-no} == yes ]] || {
        echo "error: no step can run without $need: ${WHY[$need]:-unknown}$($CPU || echo "; --cpu tries the script without a GPU")" >&2
        exit 1
    }
done

# ---- the steps

forget() { # STEP: what it made, and the steps that build on it
    local name after
    rm -f "$OUTPUT/$1.ended"
    case $1 in
    images) rm -rf "$OUTPUT/images" ;;
    train) rm -rf "$OUTPUT/run" ;;
    retrain) rm -rf "$OUTPUT/run/retrain" ;;
    esac
    for row in "${STEPS[@]}"; do
        read -r name _ _ _ after _ <<<"$row"
        [[ $after != "$1" ]] || forget "$name"
    done
}

why_not() { # NEEDS,... -> the first that is missing and why
    local need
    for need in ${1//,/ }; do
        [[ ${THERE[$need]:-no} == yes ]] || { echo "needs $need: ${WHY[$need]:-unknown}" && return; }
    done
}

RESULTS=${RESULTS:-benchmarks/results/first_gpu_hour}
SUMMARY=() FAILED=0 CHILD=""

note() { # STEP OUTCOME SECONDS
    SUMMARY+=("$(printf '%-24s %6s s  %s' "$1" "$3" "$2")")
}

summary() {
    {
        echo
        echo "Summary ($OUTPUT):"
        printf '%s\n' "${SUMMARY[@]}"
    } | tee "$OUTPUT/summary.txt"
}

# shellcheck disable=SC2317 # the trap calls it
stop() {
    trap '' INT TERM
    if [[ -n $CHILD ]]; then kill -TERM "$CHILD" && wait "$CHILD"; fi
    note "$name" "STOPPED; the same call goes on from here" $((SECONDS - began))
    summary
    exit 1
}

keep_figures() { # STEP: those of a GPU go to benchmarks/results, or where RESULTS says
    if ! $CPU && [[ -f $OUTPUT/$1.json ]]; then
        mkdir -p "$RESULTS" && cp "$OUTPUT/$1.json" "$RESULTS/"
    fi
}

run_step() { # STEP MINUTES
    local limit code
    limit=$(awk "BEGIN { print 60 * $2 * $PATIENCE }")
    command_of "$1"
    printf '\n[%(%H:%M:%S)T] %s, at most %s s, log in %s\n$ %s\n' -1 "$1" "$limit" "$OUTPUT/$1.log" "${COMMAND[*]}"
    began=$SECONDS
    timeout --kill-after=60 "$limit" "${COMMAND[@]}" >"$OUTPUT/$1.log" 2>&1 &
    CHILD=$!
    wait "$CHILD"
    code=$? CHILD=""
    if ((code == 0)); then
        date --utc +%FT%TZ >"$OUTPUT/$1.ended"
        keep_figures "$1"
        note "$1" "ended well" $((SECONDS - began))
        return
    fi
    FAILED=1
    tail -n 5 "$OUTPUT/$1.log"
    if ((code == 124 || code == 137)); then
        note "$1" "FAILED: over its limit of $limit s; --patience 2 doubles it" $((SECONDS - began))
    else
        note "$1" "FAILED with exit code $code; log in $OUTPUT/$1.log" $((SECONDS - began))
    fi
}

for name in "${REDO[@]}"; do forget "$name"; done
trap stop INT TERM
began=$SECONDS
for row in "${STEPS[@]}"; do
    read -r name gpu_minutes cpu_minutes needs after _ <<<"$row"
    ((${#ONLY[@]} == 0)) || among "$name" "${ONLY[@]}" || continue
    why=$(why_not "$needs")
    if [[ -f $OUTPUT/$name.ended ]]; then
        note "$name" "ended well before" -
    elif [[ -n $why ]]; then
        note "$name" "skipped: $why" -
    elif [[ $after != - && ! -f $OUTPUT/$after.ended ]]; then
        note "$name" "skipped: builds on $after, which has not ended well" -
    else
        run_step "$name" "$($CPU && echo "$cpu_minutes" || echo "$gpu_minutes")"
    fi
done
summary
exit $FAILED
