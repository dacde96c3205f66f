#!/bin/sh
# Makes accel/zoo/smollm2-135m-draft with the accel that is on the PATH. The training took half an hour on one CPU core
# that multiplies bf16; the target's 1,070,000 answer tokens take longer. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
accel distill draft smollm2-135m-instruct --prompts prompts.jsonl --longest-prompt 1024 --data target@0,target@1 \
  --max-new-tokens 192 --dtype bfloat16 --layers 0 --vocabulary 7680 --loss fkl --batch-tokens 2048 --steps 2000 \
  --learning-rate 0.003 --seed 0 --work ../../../../build/smollm2-135m-draft --output ../../smollm2-135m-draft "$@"
