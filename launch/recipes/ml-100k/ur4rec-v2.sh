#!/usr/bin/env bash
# UR4Rec V2 on MovieLens 100K: SASRec, then the text retriever, then both, then both and the text encoder's last layers.
# Started again, it goes on where it was stopped. Figures are in docs/methods/ur4rec-v2.md.
#   launch/recipes/ml-100k/ur4rec-v2.sh [flags for every run, such as --train.seed 1]
set -euo pipefail
cd "$(dirname "$0")/../../.."

train() { # model, name of the run, then flags
    accelerate launch launch/train.py --model "$1" --data.source ml-100k --output "runs/ml-100k-$2" "${@:3}"
}

train sasrec sasrec "$@"
train ur4rec-v2 ur4rec-v2 "$@"
train ur4rec-v2 ur4rec-v2-joint --method.train joint --method.init runs/ml-100k-ur4rec-v2 \
    --train.epochs 3 --train.lr 0.0003 --train.schedule cosine --train.max_grad_norm 1.0 \
    --train.lr_multipliers '{"sasrec": 0.5}' "$@"
train ur4rec-v2 ur4rec-v2-end-to-end --method.train end-to-end --method.init runs/ml-100k-ur4rec-v2-joint \
    --method.cuts 4 --train.max_steps 8 --train.lr 0.0001 --train.schedule cosine --train.max_grad_norm 1.0 \
    --train.lr_multipliers '{"sasrec": 0.5, "encoder": 0.1}' "$@"

for run in ur4rec-v2 ur4rec-v2-joint ur4rec-v2-end-to-end; do
    accelerate launch launch/evaluate.py --run "runs/ml-100k-$run" --protocol sampled-100
done
python launch/report.py runs/ml-100k-sasrec runs/ml-100k-ur4rec-v2{,-joint,-end-to-end} --to runs/ur4rec-v2-report
