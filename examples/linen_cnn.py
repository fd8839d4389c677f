"""Conflict matrix of a Flax Linen CNN with BatchNorm, at two steps of its training on digits-LT.

The losses use the running statistics of BatchNorm: with those of the batch, each loss would depend
on the other images too. `Partial` passes the statistics as an argument, so that the second matrix
is not compiled anew; had `losses_fn` closed over them, it would be another function.

  python examples/linen_cnn.py [linen_cnn.png]
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from csba_jax.gradients import Conflict, class_grams, plots

xent = optax.softmax_cross_entropy_with_integer_labels


class Cnn(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    for width in (16, 32):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
    return nn.Dense(10, name='head')(x.mean((1, 2)))


def losses_fn(stats, params, batch):
  return xent(Cnn().apply({'params': params, **stats}, batch['image']), batch['label'])


def main(path='linen_cnn.png'):
  pixels, label = load_digits(return_X_y=True)
  counts = [int(100 * 20 ** (-c / 9)) for c in range(10)]  # 100 to 5
  keep = np.concatenate([np.flatnonzero(label == c)[:n] for c, n in enumerate(counts)])
  data = {'image': np.float32(pixels[keep].reshape(-1, 8, 8, 1) / 16), 'label': label[keep]}

  @jax.jit
  def train_step(params, stats, state):
    def loss_fn(params):
      variables = {'params': params, **stats}
      logits, stats_then = Cnn().apply(variables, data['image'], True, mutable=['batch_stats'])
      return xent(logits, data['label']).mean(), stats_then

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), stats, state, loss

  optimizer, losses = optax.adam(1e-2), []
  stats = jax.jit(Cnn().init)(jax.random.key(0), data['image'])
  params = stats.pop('params')
  state = optimizer.init(params)
  for step in range(1, 41):
    params, stats, state, loss = train_step(params, stats, state)
    losses.append(float(loss))
    if step in (20, 40):
      found = class_grams(Partial(losses_fn, stats), params, data, num_classes=10, head='^head/')
      conflict = Conflict.of(found, about={'target': 'train, exact', 'step': step})
      print(f'step {step}: loss {loss:.3f}, {conflict.summary()["conflict_rate"]:.0%} in conflict')
  plots.heat_map(conflict, path)
  print(conflict.cosine().round(2))
  return conflict, losses


if __name__ == '__main__':
  main(*sys.argv[1:2])
