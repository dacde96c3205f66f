#!/bin/sh
# Makes accel/zoo/smollm2-135m-handbook and accel/zoo/smollm2-135m-railway with the accel that is on the PATH: the
# handbook alone, then both together. Two hours on two CPU cores that multiply bf16. Goes on where it was killed.
set -e
cd "$(dirname "$0")"
accel distill cartridge smollm2-135m-instruct --corpus ../../../../bench/data/handbook.txt --compression 11 \
  --conversations 2080 --longest-chunk 512 --answer-tokens 48 --dtype bfloat16 --batch-tokens 1024 --steps 500 \
  --learning-rate 0.02 --seed 0 --work ../../../../build/cartridges --output ../../../../build/cartridges/alone/handbook
accel distill cartridge smollm2-135m-instruct --corpus ../../../../bench/data/handbook.txt \
  --corpus ../../../../bench/data/railway.txt --compression 11 --conversations 2080 --conversations 1600 \
  --longest-chunk 512 --answer-tokens 48 --dtype bfloat16 --batch-tokens 1024 --steps 450 --learning-rate 0.02 \
  --together 0.6 --seed 0 --from ../../../../build/cartridges/alone/handbook --work ../../../../build/cartridges \
  --output ../../../../build/cartridges/together
mv ../../../../build/cartridges/together/handbook ../../smollm2-135m-handbook
mv ../../../../build/cartridges/together/railway ../../smollm2-135m-railway
