"""Writes surgery_reference.npz for test_surgery.py: weights by TorchJD for 200 random Grams.

  pip install torch==2.13.0 torchjd==0.18.0 quadprog==0.1.14 qpsolvers==4.13.0 cvxpy==1.9.3 \
    clarabel==0.11.1
  python tests/gradients/surgery_reference.py

Grams are float32, of float64 rows whose norms differ up to 300 times; TorchJD gets them as float64.
"""

import pathlib

import numpy as np
import torch
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

EACH, CLASSES = 50, (2, 3, 5, 10)


def grams(classes):
  """[EACH, C, C]: independent rows, and rows with a part in common or opposed to one another."""
  rng = np.random.default_rng(classes)
  found = []
  for i in range(EACH):
    width = classes * rng.integers(2, 6)
    rows = rng.normal(size=(classes, width))
    if i % 3 == 1:
      rows += rng.normal(size=width)
    elif i % 3 == 2:
      rows -= 0.7 * rows.mean(0)
    rows *= np.exp(rng.uniform(0, np.log([3, 30, 300][i % 3]), classes))[:, None]
    found.append(rows @ rows.T)
  return np.stack(found).astype(np.float32)


def weightings(classes):
  ones = torch.ones(classes, dtype=torch.float64)
  projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
  found = {
    'upgrad': aggregation.UPGradWeighting(ones, projector=projector),
    'dual_projection': aggregation.DualProjWeighting(ones, projector=projector),
    'mgda': aggregation.MGDAWeighting(epsilon=1e-12, max_iters=4000),
    'cagrad': aggregation.CAGradWeighting(c=0.5, norm_eps=0.0),
  }
  if classes == 2:  # the order does not matter
    found |= {'pcgrad': aggregation.PCGradWeighting()}
    found |= {'gradvac': aggregation.GradVacWeighting(beta=0.3, eps=0.0)}
  return found


def main():
  arrays = {}
  for classes in CLASSES:
    arrays[f'gram_{classes}'] = grams(classes)
    for name, weigh in weightings(classes).items():
      found = []
      for gram in torch.from_numpy(arrays[f'gram_{classes}'].astype(np.float64)):
        if name == 'gradvac':
          weigh.reset()  # agreement first, so that the targets rise
          found.append([weigh(g).numpy() for g in (gram.abs(), gram, gram)])
        else:
          found.append(weigh(gram).numpy())
      arrays[f'{name}_{classes}'] = np.array(found, np.float32)
  np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **arrays)


if __name__ == '__main__':
  main()
