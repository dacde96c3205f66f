#!/bin/sh
# Makes accel/zoo/smollm2-135m-draft with the accel that is on the PATH, in two trainings. The first takes half an hour
# on one CPU core that multiplies bf16, the second twenty minutes on two that do not; the target's 1,070,000 and 225,000
# answer tokens take longer. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
build=../../../../build/smollm2-135m-draft
[ -d "$build/first" ] || accel distill draft smollm2-135m-instruct --prompts prompts.jsonl --longest-prompt 1024 \
  --data target@0,target@1 --max-new-tokens 192 --dtype bfloat16 --layers 0 --vocabulary 7680 --loss fkl \
  --batch-tokens 2048 --steps 2000 --learning-rate 0.003 --seed 0 --work "$build/first.work" --output "$build/first" "$@"
python second.py > "$build/second.jsonl"
accel distill draft smollm2-135m-instruct --from "$build/first" --lags 2 --copying 0.5 --prompts "$build/second.jsonl" \
  --longest-prompt 1024 --data target@0,target@1 --max-new-tokens 128 --dtype bfloat16 --loss fkl --batch-tokens 2048 \
  --steps 900 --learning-rate 0.002 --seed 0 --work "$build/second.work" --output ../../smollm2-135m-draft "$@"
