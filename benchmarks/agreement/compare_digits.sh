#!/usr/bin/env bash
# Other methods beside unlearned models, on the models and images of digits.sh: some minutes of one CPU core.
#   benchmarks/agreement/compare_digits.sh [FOLDER]
# An encoder is trained on the same images first, without labels, where FOLDER/encoder is not there.
# The rows end in benchmarks/results/compare_digits.csv and compare_digits_costs.csv.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-runs/agreement/digits}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ ! -f "$runs/encoder/config.json" ]; then
  .venv/bin/python -m benchmarks.agreement.train_encoder digits "$runs/encoder" \
    --rows benchmarks/results/train_encoder.csv
fi
.venv/bin/guda-fast compare "$runs/queries" --base "$runs/base" --data digits --out "$runs/compared" \
  --oracle "$runs/logo-0" --oracle "$runs/logo-1" --stride 10 \
  --models "ReTrack=$runs/retrack" --models "ReTrack, capped=$runs/capped" \
  --models "ReTrack, official loss=$runs/official-loss" \
  --models "SISS=$runs/siss" --models "EraseDiff=$runs/erasediff" \
  --method "pixels,name=pixels" --method "pixels,reduce=top-k,name=pixels 10 nearest" \
  --method "unet,name=UNet features" --method "unet,reduce=top-k,name=UNet features 10 nearest" \
  --method "encoder,folder=$runs/encoder,name=ViT features" \
  --method "encoder,folder=$runs/encoder,reduce=top-k,name=ViT features 10 nearest" \
  --method "trak,name=TRAK" --method "trak,aggregate=top-k,name=TRAK top 10" \
  --method "d-trak,name=D-TRAK" --method "das,name=DAS" \
  --method "query-unlearning,images_per_group=16,name=query unlearning"
cp "$runs/compared/agreement.csv" benchmarks/results/compare_digits.csv
cp "$runs/compared/costs.csv" benchmarks/results/compare_digits_costs.csv
