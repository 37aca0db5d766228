#!/usr/bin/env bash
# UR4Rec V2 on MovieLens 100K: SASRec, then the text retriever, then both, then both and the text encoder's last layers.
# Started again, it goes on where it was stopped. Figures are in docs/methods/ur4rec-v2.md.
#
#   launch/recipes/ml-100k/ur4rec-v2.sh [flags for every run]
#   SEED=1 launch/recipes/ml-100k/ur4rec-v2.sh
set -euo pipefail
seed=${SEED:-42}
cd "$(dirname "$0")/../../.."
retriever=runs/ml-100k-ur4rec-v2-seed$seed joint=runs/ml-100k-ur4rec-v2-joint-seed$seed
sasrec=runs/ml-100k-sasrec-seed$seed last=runs/ml-100k-ur4rec-v2-end-to-end-seed$seed

train() { # model, folder of the run, then flags
    accelerate launch launch/train.py --model "$1" --data.source ml-100k --train.seed "$seed" --output "$2" "${@:3}"
}

stage() { # folder of the run, then flags
    train ur4rec-v2 "$1" --method.sasrec "$sasrec" "${@:2}"
}

train sasrec "$sasrec" "$@"
stage "$retriever" "$@"
stage "$joint" --method.train joint --method.init "$retriever" --train.epochs 3 --train.lr 0.0003 \
    --train.schedule cosine --train.max_grad_norm 1.0 --train.lr_multipliers '{"sasrec": 0.5}' "$@"
stage "$last" --method.train end-to-end --method.init "$joint" --method.cuts 4 --train.max_steps 8 --train.lr 0.0001 \
    --train.schedule cosine --train.max_grad_norm 1.0 --train.lr_multipliers '{"sasrec": 0.5, "encoder": 0.1}' "$@"

for run in "$retriever" "$joint" "$last"; do
    accelerate launch launch/evaluate.py --run "$run" --protocol sampled-100
done
# Of all seeds that are there, each stage against SASRec.
python launch/report.py runs/ml-100k-sasrec-seed* runs/ml-100k-ur4rec-v2{,-joint,-end-to-end}-seed* \
    --to runs/ur4rec-v2-report
