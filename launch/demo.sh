#!/usr/bin/env bash
# Digits-LT: the control `none` and `csba`, trained one after the other, side by side in one table.
# Needs: the package installed (make demo does it). Costs: under 90 s on two CPU cores.
set -euo pipefail
bin=${BIN:+$BIN/}
rm -rf runs/demo # the demo always trains anew
for attention in none csba; do
  echo "== $attention"
  "${bin}csba-train" --config=configs/digits_lt.py --workdir="runs/demo/$attention" \
    --config.model.attention="$attention" >/dev/null
done
"${bin}csba-report" --workdirs=runs/demo/none,runs/demo/csba
