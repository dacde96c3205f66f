#!/bin/sh
# Makes accel/zoo/smollm2-135m-lawcat, a conversion of some layers of smollm2-135m-instruct, with the python and the accel
# that are on the PATH. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
mkdir -p ../../../../build/smollm2-135m-lawcat
model=$(python -c 'from accel.models.aliases import local_folder; print(local_folder("smollm2-135m-instruct"))')
python ../retrieval-1m/tasks.py --tokenizer "$model" --count 200 --length 512 --seed 5 \
  > ../../../../build/smollm2-135m-lawcat/lessons.jsonl
accel distill lawcat smollm2-135m-instruct --prompts ../smollm2-135m-draft/prompts.jsonl \
  --prompts ../../../../build/smollm2-135m-lawcat/lessons.jsonl --length 512 --batch-tokens 2048 --transfer-steps 60 \
  --keep-softmax 20 --tune-steps 30 --tune-rate 1e-3 --tune-own --next-token 0 --held-out 0.005 --checkpoint-every 10 \
  --work ../../../../build/smollm2-135m-lawcat/work --output ../../smollm2-135m-lawcat "$@"
