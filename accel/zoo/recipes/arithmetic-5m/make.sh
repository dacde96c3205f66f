#!/bin/sh
# Makes build/arithmetic/base, a masked-diffusion model of word problems, with the python and the accel that are on the
# PATH. Two hours on a CPU core that multiplies bf16. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
mkdir -p ../../../../build/arithmetic
python problems.py --count 80500 --seed 0 > ../../../../build/arithmetic/all.jsonl
python problems.py --sums > ../../../../build/arithmetic/sums.jsonl
cd ../../../../build/arithmetic
tail -n 500 all.jsonl > dev.jsonl
head -n 80000 all.jsonl > train.jsonl
# every sum thirty times among them: what is asked for least often is learned last
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do cat sums.jsonl; done >> train.jsonl
head -n 6000 all.jsonl > prompts.jsonl
cd ../../accel/zoo/recipes/arithmetic-5m
test -d ../../../../build/arithmetic/causal || \
  python ../causal.py --prompts ../../../../build/arithmetic/train.jsonl --output ../../../../build/arithmetic/causal
accel distill a2d ../../../../build/arithmetic/causal --prompts ../../../../build/arithmetic/train.jsonl --shift \
  --block-length 16 --max-new-tokens 48 --noise maskgit --steps 3000 --batch-tokens 4096 --learning-rate 1e-3 \
  --held-out 0.002 --max-disk 3GB --seed 0 --output ../../../../build/arithmetic/base
