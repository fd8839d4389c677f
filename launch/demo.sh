#!/usr/bin/env bash
# Digits-LT: the net without attention (none) and with CSBA (csba), three seeds each, in one table.
# Every net has the learning rate that its tuning chose on validation data: 0.4 for none and 0.1
# for csba. The study reads them from results/digits_tuning, which configs/study_digits_tuning.py
# made. The last step draws who is in conflict with whom, for the first seed of both nets.
# Needs: the package installed (make demo does it).
# Costs: 220 s with Python 3.13 and JAX 0.11.2, 271 s with Python 3.11 and JAX 0.10.2 (two slow CPU
# cores, AMD EPYC; nothing was compiled before; one measurement each).
set -euo pipefail
bin=${BIN:+$BIN/}
rm -rf runs/demo # the demo always trains anew
"${bin}csba-study" --config=study_digits --workdir=runs/demo --jobs=2 --keep_runs \
  --config.variants="('none', 'csba')" --config.methods="('cross_entropy',)" \
  --config.first_seed=0 --config.seeds=3 \
  --config.base.diagnostics.snapshots= --config.base.diagnostics.loss_levels= \
  --config.base.train.log_every=50
for net in none csba; do # side by side, one core each
  "${bin}csba-diagnose" --workdir="runs/demo/runs/$net-s0" --exact >"runs/demo/$net-conflict.txt" &
  diagnoses+=($!)
done
for diagnosis in "${diagnoses[@]}"; do wait "$diagnosis"; done
workdirs=()
for net in none csba; do
  cp "runs/demo/runs/$net-s0/conflict/"*_shared.png "runs/demo/$net-conflict.png"
  workdirs+=("runs/demo/runs/$net-s"{0,1,2})
done
"${bin}csba-report" --workdirs="$(IFS=,; echo "${workdirs[*]}")"
echo "conflict matrices: runs/demo/{none,csba}-conflict.txt and .png"
