#!/bin/sh
# Makes in build/retrieval what ships in accel/zoo: retrieval-1m, a softmax model that finds numbers in texts, and
# retrieval-1m-lawcat, its layers made linear; with --ablations also three that lack something. With the python and the
# accel that are on the PATH. Both take under half an hour of a CPU core that multiplies bf16.
set -e
cd "$(dirname "$0")"
mkdir -p ../../../../build/retrieval
python tasks.py --tokenizer-output ../../../../build/retrieval/tokenizer
python tasks.py --tokenizer ../../../../build/retrieval/tokenizer --count 12000 --length 128 --shortest 72 --easy \
  --seed 1 > ../../../../build/retrieval/mixed.jsonl
python tasks.py --tokenizer ../../../../build/retrieval/tokenizer --count 16000 --length 128 --seed 3 \
  > ../../../../build/retrieval/lessons.jsonl
test -d ../../../../build/retrieval/retrieval-1m ||
python ../causal.py --prompts ../../../../build/retrieval/mixed.jsonl --tokenizer ../../../../build/retrieval/tokenizer \
  --hidden 128 --layers 4 --heads 2 --look-back --positions 128 --batch-tokens 2048 --steps 2000 \
  --learning-rate 2e-3 --prompt-weight 0.3 --artifact --output ../../../../build/retrieval/retrieval-1m
cd ../../../../build/retrieval
# ids are looked for here first
export ACCEL_ARTIFACTS="$PWD"
accel distill lawcat retrieval-1m --prompts lessons.jsonl --length 128 --batch-tokens 2048 --transfer-steps 150 \
  --tune-steps 800 --tune-rate 3e-3 --lora-rank 16 --lora-alpha 32 --tune-own --next-token 0 --held-out 0.01 \
  --checkpoint-every 200 --output retrieval-1m-lawcat
test "$1" = --ablations || exit 0
for without in no-conv gate-rank=0 no-denominator; do
  accel distill lawcat retrieval-1m --prompts lessons.jsonl --length 128 --batch-tokens 2048 --transfer-steps 150 \
    --tune-steps 800 --tune-rate 3e-3 --lora-rank 16 --lora-alpha 32 --tune-own --next-token 0 --held-out 0.01 \
    --checkpoint-every 200 --"$without" --output "$without"
done
