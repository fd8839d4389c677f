#!/usr/bin/env bash
# The studies of docs/study.md that two CPU cores can do: Digits-LT and the solar panels. For each,
# it tunes the learning rates, trains all runs and writes the report; last, the README's section.
# Needs: the package installed. Set $CSBA_IMAGE_FOLDER for the solar panels, else it skips them.
# Costs: see the reports (seconds of all runs together). If you start it again, it does the rest.
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
