"""
A Flax Linen CNN with BatchNorm
===============================

The conflict matrix of a small CNN, at two steps of its training on long-tailed digits.

The losses use the running statistics of BatchNorm. With the statistics of the batch, the loss of
an image would depend on the other images of the batch too.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from csba_jax.gradients import Conflict, class_grams, plots

# %%
# The data: handwritten digits, from 100 images of class 0 down to 5 of class 9.

pixels, label = load_digits(return_X_y=True)
counts = [int(100 * 20 ** (-c / 9)) for c in range(10)]
keep = np.concatenate([np.flatnonzero(label == c)[:n] for c, n in enumerate(counts)])
data = {'image': np.float32(pixels[keep].reshape(-1, 8, 8, 1) / 16), 'label': label[keep]}

# %%
# The model. Its last layer has a name, ``head``: conflict is measured in the layers that all
# classes share, and the rows of the classifier belong to single classes.

xent = optax.softmax_cross_entropy_with_integer_labels


class Cnn(nn.Module):
  """Two convolutions, each with BatchNorm.   [N, 8, 8, 1] -> [N, 10]"""

  @nn.compact
  def __call__(self, x, train=False):
    for width in (16, 32):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
    return nn.Dense(10, name='head')(x.mean((1, 2)))


# %%
# An ordinary training step. It uses the statistics of the batch, and updates the running ones.

optimizer = optax.adam(1e-2)


@jax.jit
def train_step(params, stats, state):
  def loss_fn(params):
    variables = {'params': params, **stats}
    logits, stats_then = Cnn().apply(variables, data['image'], True, mutable=['batch_stats'])
    return xent(logits, data['label']).mean(), stats_then

  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, state = optimizer.update(grads, state)
  return optax.apply_updates(params, updates), stats, state, loss


# %%
# What csba_jax needs: a function from parameters and a batch to one loss for each image. The
# statistics are its first argument, and ``Partial`` passes them. The compiled program can then be
# used again with other statistics. If the function closed over them, it would be a new function at
# every step, and would be compiled again.


def losses_fn(stats, params, batch):
  return xent(Cnn().apply({'params': params, **stats}, batch['image']), batch['label'])


# %%
# Train, and measure at steps 20 and 40.

stats = jax.jit(Cnn().init)(jax.random.key(0), data['image'])
params = stats.pop('params')
state, losses = optimizer.init(params), []
for step in range(1, 41):
  params, stats, state, loss = train_step(params, stats, state)
  losses.append(float(loss))
  if step in (20, 40):
    grams = class_grams(Partial(losses_fn, stats), params, data, num_classes=10, head='^head/')
    conflict = Conflict.of(grams, about={'target': 'train, exact', 'step': step})
    print(f'step {step}: loss {loss:.3f}, {conflict.summary()["conflict_rate"]:.0%} in conflict')

# %%
# Red pairs are in conflict: a small step for one class raises the loss of the other.
#
# .. image:: /_static/examples/linen_cnn.png
#    :alt: Heat map of the conflict matrix

plots.heat_map(conflict, 'linen_cnn.png')
print(conflict.cosine().round(2))

# sphinx_gallery_thumbnail_path = '_static/examples/linen_cnn.png'
