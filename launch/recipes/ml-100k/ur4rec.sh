#!/usr/bin/env bash
# UR4Rec on MovieLens 100K: SASRec's item vectors, descriptions, the first stage, then the base ranker alone and with texts on
# the same lists: each target among 100 random unseen items. Started again, it goes on where it was stopped. No result of these
# settings yet; docs/methods/ur4rec.md has one of shorter runs.
#   RANKER=sasrec WRITER=Qwen/Qwen2.5-7B-Instruct launch/recipes/ml-100k/ur4rec.sh [flags for every run, such as --train.seed 1]
set -euo pipefail
cd "$(dirname "$0")/../../.."
source=${SOURCE:-ml-100k} ranker=${RANKER:-prm} writer=${WRITER:-template}
read -ra data <<< "--data.source $source ${DATA:-}"
runs=runs/$source texts=descriptions/$source-${writer##*/}

describe=(launch/describe.py "${data[@]}" --texts.profile_every "${EVERY:-10}" --output "$texts")
if [[ $writer == template ]]; then
    python "${describe[@]}"
else
    accelerate launch "${describe[@]}" --writer model --backbone.name "$writer"
fi

train() { # model, run, then flags
    accelerate launch launch/train.py --model "$1" "${data[@]}" --output "$runs-$2" "${@:3}"
}
common=(--method.hidden_size "${WIDTH:-64}" --method.cuts 8 --train.batch_size 64 --train.epochs 30 --train.patience 3)
read_texts=(--method.preferences.descriptions "$texts")
lists=(--evaluation.protocol sampled-100 --method.ranker "$ranker")

train sasrec sasrec "$@"
train ur4rec-pretrain ur4rec-pretrain "${common[@]}" "${read_texts[@]}" --method.item_vectors "$runs-sasrec" "$@"
train ur4rec "$ranker-lists" "${common[@]}" "${lists[@]}" --method.augment false --method.item_vectors "$runs-sasrec" "$@"
train ur4rec "$ranker-ur4rec" "${common[@]}" "${lists[@]}" "${read_texts[@]}" --method.init "$runs-ur4rec-pretrain" "$@"
python launch/report.py "$runs-$ranker-lists" "$runs-$ranker-ur4rec" --to "report/$source-$ranker-ur4rec"
