"""Conflict matrix of an Equinox MLP: exact for its training set, and estimated for new data.

`eqx.partition` parts the model into `params`, whose leaves are float arrays, and the rest. For new
data of the same kind the matrix is known up to an error: `estimated_conflict` takes data that the
model was not trained on, and gives 95 % intervals.

  python examples/equinox_mlp.py [equinox_mlp.png]
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

from csba_jax.gradients import Conflict, class_grams, estimated_conflict, plots

COUNTS = (800, 300, 100, 40, 15)
CLASSES, FEATURES = len(COUNTS), 20


def draw(rng, counts):
  """Points of normal distributions, one for each class, that overlap."""
  centres = 0.7 * np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
  label = np.repeat(np.arange(CLASSES), counts)
  return {'x': np.float32(rng.normal(centres[label])), 'label': label}


def main(path='equinox_mlp.png'):
  rng, path = np.random.default_rng(1), Path(path)
  data, new = draw(rng, COUNTS), draw(rng, 100)
  model = eqx.nn.MLP(FEATURES, CLASSES, width_size=64, depth=2, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def losses_fn(params, batch):
    logits = jax.vmap(eqx.combine(params, static))(batch['x'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  @jax.jit
  def train_step(params, state):
    loss, grads = jax.value_and_grad(lambda params: losses_fn(params, data).mean())(params)
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(params, updates), state, loss

  optimizer, losses = optax.adam(3e-3), []
  state = optimizer.init(params)
  for _ in range(40):
    params, state, loss = train_step(params, state)
    losses.append(float(loss))

  args = {'num_classes': CLASSES, 'head': '^layers/2/'}
  found = class_grams(losses_fn, params, data, **args)
  conflict = Conflict.of(found, about={'target': 'train, exact'})
  plots.heat_map(conflict, path)
  print(conflict.cosine().round(2))

  args |= {'target': 'population', 'images': 100, 'class_counts': COUNTS}
  estimate = estimated_conflict(losses_fn, params, new, **args)
  plots.heat_map(estimate, path.with_stem(f'{path.stem}_new'))
  low, high = (ends[estimate.at('shared')] for ends in (estimate.low, estimate.high))
  for c, d in zip(*np.triu_indices(CLASSES, 1), strict=True):
    interval = f'[{low[c, d]:.2f}, {high[c, d]:.2f}]'
    print(f'classes {c} and {d} on new data: {estimate.cosine()[c, d]:.2f} {interval}')
  return conflict, losses


if __name__ == '__main__':
  main(*sys.argv[1:2])
