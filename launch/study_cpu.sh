#!/usr/bin/env bash
# The studies of docs/study.md that two CPU cores can do: Digits-LT and the solar panels, each with
# its learning rates first, then the reports and the README's section.
# Needs: the package installed; for the solar panels $CSBA_IMAGE_FOLDER, else they are left out.
# Costs: see the reports (seconds of all runs together). Started again it does what is missing.
set -euo pipefail
bin=${BIN:+$BIN/}
studies=(digits)
if [ -n "${CSBA_IMAGE_FOLDER:-}" ]; then studies+=(solar); fi
for study in "${studies[@]}"; do
  for name in "${study}_tuning" "$study"; do
    "${bin}csba-study" --config="configs/study_$name.py" --workdir="results/$name" --jobs=2
  done
  "${bin}csba-report" --workdir="results/$study"
done
"${bin}csba-report" --readme=README.md
