#!/usr/bin/env bash
# CIFAR-10-LT on two CPU cores: none and csba, each with cross-entropy and balanced softmax.
# Needs: CIFAR-10 prepared for TFDS as array_record under $TFDS_DATA_DIR. Costs: about 40 minutes.
# Started again it goes on where it was.
set -euo pipefail
bin=${BIN:+$BIN/}
workdirs=()
for loss in cross_entropy balanced_softmax; do
  for attention in none csba; do
    workdir=runs/cifar10_lt_cpu/${loss}_${attention}
    workdirs+=("$workdir")
    "${bin}csba-train" --config=configs/cifar10_lt_cpu.py --workdir="$workdir" \
      --config.loss.name="$loss" --config.model.attention="$attention" >/dev/null
  done
done
"${bin}csba-report" --workdirs="$(IFS=,; echo "${workdirs[*]}")"
