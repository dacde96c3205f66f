#!/bin/sh
# Makes accel/zoo/arithmetic-5m-base and accel/zoo/arithmetic-5m-dparallel with the python and the accel that are on the
# PATH. Nearly three hours on a CPU core that multiplies bf16. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
mkdir -p ../../../../build/arithmetic
python problems.py --count 80500 --seed 0 > ../../../../build/arithmetic/all.jsonl
python problems.py --sums > ../../../../build/arithmetic/sums.jsonl
cd ../../../../build/arithmetic
tail -n 250 all.jsonl > dev.jsonl
head -n 80000 all.jsonl > train.jsonl
# every sum thirty times among them: what is asked for least often is learned last
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do cat sums.jsonl; done >> train.jsonl
head -n 12000 all.jsonl > problems.jsonl
cd ../../accel/zoo/recipes/arithmetic-5m
test -d ../../../../build/arithmetic/causal ||
  python ../causal.py --prompts ../../../../build/arithmetic/train.jsonl --whole-numbers \
    --vocabulary 1024 --steps 800 --output ../../../../build/arithmetic/causal
test -d ../../../../build/arithmetic/base ||
  accel distill a2d ../../../../build/arithmetic/causal --prompts ../../../../build/arithmetic/train.jsonl --shift \
    --block-length 16 --max-new-tokens 48 --noise block --steps 1500 --batch-tokens 4096 --learning-rate 5e-4 \
    --held-out 0.002 --max-disk 3GB --seed 0 --output ../../../../build/arithmetic/base
# what is learned from next: worded alike whenever a problem comes again, and right
python answers.py --model ../../../../build/arithmetic/causal --problems ../../../../build/arithmetic/problems.jsonl \
  > ../../../../build/arithmetic/answers.jsonl
cd ../../../../build/arithmetic
cat answers.jsonl sums.jsonl sums.jsonl sums.jsonl > lessons.jsonl
cd ../../accel/zoo/recipes/arithmetic-5m
test -d ../../../../build/arithmetic/dparallel ||
  accel distill dparallel ../../../../build/arithmetic/base --prompts ../../../../build/arithmetic/lessons.jsonl --data file \
    --lora-rank 0 --beta 2 --max-new-tokens 48 --steps 1000 --batch-tokens 4096 --learning-rate 4e-4 --held-out 0.005 \
    --max-disk 3GB --seed 0 --output ../../../../build/arithmetic/dparallel
# and from a block of masks on, where decoding begins
test -d ../../../../build/arithmetic/longer ||
  accel distill dparallel ../../../../build/arithmetic/dparallel --prompts ../../../../build/arithmetic/lessons.jsonl --data file \
    --noise block --lora-rank 0 --max-new-tokens 48 --steps 800 --batch-tokens 4096 --learning-rate 4e-4 --held-out 0.005 \
    --max-disk 3GB --seed 1 --output ../../../../build/arithmetic/longer
# and more gently, on fewer problems
cd ../../../../build/arithmetic
head -n 7938 answers.jsonl > lessons.jsonl
cat sums.jsonl sums.jsonl >> lessons.jsonl
cd ../../accel/zoo/recipes/arithmetic-5m
test -d ../../../../build/arithmetic/longest ||
  accel distill dparallel ../../../../build/arithmetic/longer --prompts ../../../../build/arithmetic/lessons.jsonl --data file \
    --noise block --lora-rank 0 --max-new-tokens 48 --steps 800 --batch-tokens 4096 --learning-rate 2e-4 --held-out 0.005 \
    --max-disk 3GB --seed 2 --output ../../../../build/arithmetic/longest
accel distill calibrate ../../../../build/arithmetic/longest --prompts ../../../../build/arithmetic/dev.jsonl \
  --budget 1 --thresholds 0.4,0.5,0.6,0.7,0.8 --rows 32
# and once more, with twice the weight on certainty
test -d ../../../../build/arithmetic/certain ||
  accel distill dparallel ../../../../build/arithmetic/longest --prompts ../../../../build/arithmetic/lessons.jsonl --data file \
    --noise block --beta 4 --lora-rank 0 --max-new-tokens 48 --steps 800 --batch-tokens 4096 --learning-rate 2e-4 \
    --held-out 0.005 --max-disk 3GB --seed 3 --output ../../../../build/arithmetic/certain
accel distill calibrate ../../../../build/arithmetic/certain --prompts ../../../../build/arithmetic/dev.jsonl \
  --budget 1 --thresholds 0.4,0.5 --rows 32
cp -r ../../../../build/arithmetic/base ../../arithmetic-5m-base
cp -r ../../../../build/arithmetic/certain ../../arithmetic-5m-dparallel
