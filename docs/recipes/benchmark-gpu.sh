#!/usr/bin/env bash
# The figures of docs/performance.md that need a GPU, on one: bash docs/recipes/benchmark-gpu.sh OUTPUT_FOLDER
set -euo pipefail
out=${1:?usage: benchmark-gpu.sh OUTPUT_FOLDER}
mkdir -p "$out"

benchmark() { # NAME OPTIONS...
  echo "== $1"
  python -m par_diffusers benchmark --dtype bfloat16 --output "$out/$1" "${@:2}"
}

benchmark batch-1 --model L XL 3B --num-parallel-tokens 1 4 16 --mode eager compiled
benchmark batch-64 --model XL --num-parallel-tokens 4 --batch-size 64 --mode eager compiled
benchmark channels-last --model XL --num-parallel-tokens 4 --batch-size 1 64 --channels-last
benchmark int8 --model XL 3B --num-parallel-tokens 4 16 --quantization none int8 --mode compiled

# MFU of training on random codes of 24 x 24 tokens: the last lines of the log
python - "$out/codes" <<'PY'
import sys
from pathlib import Path

import numpy as np

rng = np.random.default_rng(0)
for name in ("codes", "labels"):
    (Path(sys.argv[1]) / name).mkdir(parents=True, exist_ok=True)
for i in range(2048):
    np.save(Path(sys.argv[1]) / "codes" / f"{i}.npy", rng.integers(0, 16384, (1, 1, 576)))
    np.save(Path(sys.argv[1]) / "labels" / f"{i}.npy", rng.integers(0, 1000, (1,)))
PY
python - "$out/xl" <<'PY'
import sys

from par_diffusers.sampling.benchmark import random_pipeline

random_pipeline("XL", 4, (24, 24)).save_pretrained(sys.argv[1])
PY
for attention in sdpa flex_attention; do
  echo "== training XL, $attention"
  python -m par_diffusers train --data "$out/codes" --vqvae "$out/xl" --model "$out/xl" --output "$out/train-$attention" \
    --attn-implementation "$attention" --attention-dropout 0 --compile --global-batch-size 64 --max-train-steps 60 \
    --logging-steps 10 --num-validation-images 0 --checkpointing-steps 1000
done
