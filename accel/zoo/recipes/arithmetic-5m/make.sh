#!/bin/sh
# Makes accel/zoo/arithmetic-5m-base and accel/zoo/arithmetic-5m-dparallel with the python and the accel that are on the
# PATH. About two hours on one CPU core that multiplies bf16. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
build=../../../../build/arithmetic
mkdir -p $build
python problems.py --count 80500 --seed 0 > $build/all.jsonl
head -n 80000 $build/all.jsonl > $build/train.jsonl
tail -n 500 $build/all.jsonl > $build/dev.jsonl
head -n 6000 $build/train.jsonl > $build/prompts.jsonl
test -d $build/causal || python causal.py --prompts $build/train.jsonl --output $build/causal
