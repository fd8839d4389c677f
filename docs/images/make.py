"""Draws docs/images/demo.png, the picture of the README, from the runs of `make demo`.

  make demo && .venv/bin/python docs/images/make.py

Left: the conflict matrix of the net without attention, first seed, over every training image.
Right: F1 on the test part by class, mean and standard deviation over the seeds of both nets.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from csba_jax.gradients import Conflict
from csba_jax.run.workdir import read_result

NETS, SEEDS = ('none', 'csba'), (0, 1, 2)
COLORS = {'none': '#8c96a3', 'csba': '#1f77b4'}


def main(runs: str = 'runs/demo/runs', path: str = 'docs/images/demo.png') -> None:
  """Draws both halves into one PNG."""
  folder = Path(runs)
  (file,) = (folder / 'none-s0/conflict').glob('step*_train_exact.npz')
  figure = Figure(figsize=(12, 5.2), layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
  draw_matrix(left, Conflict.load(file))
  draw_f1(right, {net: [read_result(folder / f'{net}-s{seed}') for seed in SEEDS] for net in NETS})
  figure.savefig(path, dpi=110)


def draw_matrix(axes, conflict):
  """Cosines of class gradients; red where a step for one class raises the loss of the other."""
  order = conflict.by_frequency
  cosines = conflict.cosine()[np.ix_(order, order)]
  np.fill_diagonal(cosines, 0)
  limit = np.abs(cosines).max()
  image = axes.imshow(cosines, cmap='RdBu', vmin=-limit, vmax=limit)
  for i, j in itertools.permutations(range(len(order)), 2):
    color = 'white' if abs(cosines[i, j]) > 0.6 * limit else 'black'
    axes.text(j, i, f'{cosines[i, j]:.2f}', ha='center', va='center', fontsize=7, color=color)
  labels = [f'{conflict.class_names[c]} ({conflict.class_counts[c]})' for c in order]
  axes.set_xticks(range(len(order)), labels, rotation=45, ha='right', rotation_mode='anchor')
  axes.set_yticks(range(len(order)), labels)
  axes.set_title('Conflict matrix: cosines of class gradients\nred: two classes disturb each other')
  axes.figure.colorbar(image, ax=axes, shrink=0.8)


def draw_f1(axes, results):
  """Bars by class, the largest class first."""
  first = results['none'][0]
  order = np.argsort(-np.array(first['class_counts']), kind='stable')
  wide = 0.8 / len(results)
  for i, (net, of_net) in enumerate(results.items()):
    f1 = np.array([result['per_class']['f1'] for result in of_net], float)[:, order]
    x = np.arange(len(order)) - 0.4 + (i + 0.5) * wide
    axes.bar(x, f1.mean(0), wide, yerr=f1.std(0, ddof=1), capsize=2, label=net, color=COLORS[net])
  labels = [f'{first["class_names"][c]} ({first["class_counts"][c]})' for c in order]
  axes.set_xticks(range(len(order)), labels, rotation=45, ha='right', rotation_mode='anchor')
  axes.set_ylim(0, 1.12)
  axes.set_xlabel('class (training images)')
  axes.set_title(f'F1 on the test part, {len(SEEDS)} seeds: mean and standard deviation')
  axes.legend(loc='upper right', ncols=2)


if __name__ == '__main__':
  main(*sys.argv[1:])
