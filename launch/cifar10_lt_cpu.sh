#!/usr/bin/env bash
# CIFAR-10-LT on two CPU cores: five methods, each with attention none and csba.
# Needs: CIFAR-10 prepared for TFDS as array_record under $TFDS_DATA_DIR. Costs: 30 to 90 minutes.
# If you start it again, it continues where it stopped.
set -euo pipefail
bin=${BIN:+$BIN/}
workdirs=()
for method in '' balanced_softmax_ logit_adjustment_ weight_decay_ class_balanced_; do
  for attention in none csba; do
    recipe=cifar10_lt_${method}cpu
    workdir=runs/$recipe/$attention
    workdirs+=("$workdir")
    "${bin}csba-train" --config="configs/$recipe.py" --workdir="$workdir" \
      --config.model.attention="$attention" >/dev/null
  done
done
"${bin}csba-report" --workdirs="$(IFS=,; echo "${workdirs[*]}")"
