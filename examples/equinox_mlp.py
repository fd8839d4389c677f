"""
An Equinox MLP, and new data
============================

The conflict matrix of an MLP for its training set, and an estimate of it for new data.

On the training set the matrix is exact. For new data of the same kind it is known up to an error:
``estimated_conflict`` takes data that the model was not trained on, and gives 95 % intervals.
"""

import equinox as eqx
import jax
import numpy as np
import optax

from csba_jax.gradients import Conflict, class_grams, estimated_conflict, plots

# %%
# The data: five classes of points, whose normal distributions overlap.

COUNTS = (800, 300, 100, 40, 15)
CLASSES, FEATURES = len(COUNTS), 20
rng = np.random.default_rng(1)


def draw(counts):
  """Points of every class.   x [N, FEATURES], label [N]"""
  centres = 0.7 * np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
  label = np.repeat(np.arange(CLASSES), counts)
  return {'x': np.float32(rng.normal(centres[label])), 'label': label}


data, new = draw(COUNTS), draw(100)

# %%
# The model. ``eqx.partition`` separates the float arrays, which are the parameters, from the rest.

model = eqx.nn.MLP(FEATURES, CLASSES, width_size=64, depth=2, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)


def losses_fn(params, batch):
  logits = jax.vmap(eqx.combine(params, static))(batch['x'])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])


# %%
# An ordinary training.

optimizer = optax.adam(3e-3)


@jax.jit
def train_step(params, state):
  loss, grads = jax.value_and_grad(lambda params: losses_fn(params, data).mean())(params)
  updates, state = optimizer.update(grads, state)
  return eqx.apply_updates(params, updates), state, loss


state, losses = optimizer.init(params), []
for _ in range(40):
  params, state, loss = train_step(params, state)
  losses.append(float(loss))

# %%
# The matrix of the training set.
#
# .. image:: /_static/examples/equinox_mlp.png
#    :alt: Heat map of the conflict matrix

args = {'num_classes': CLASSES, 'head': '^layers/2/'}
grams = class_grams(losses_fn, params, data, **args)
conflict = Conflict.of(grams, about={'target': 'train, exact'})
plots.heat_map(conflict, 'equinox_mlp.png')
print(conflict.cosine().round(2))

# %%
# The matrix for new data, with intervals. Bold numbers are those whose interval does not hold 0.
#
# .. image:: /_static/examples/equinox_mlp_new.png
#    :alt: Heat map of the conflict matrix

estimate = estimated_conflict(
  losses_fn, params, new, target='population', images=100, class_counts=COUNTS, **args
)
plots.heat_map(estimate, 'equinox_mlp_new.png')
low, high = (ends[estimate.at('shared')] for ends in (estimate.low, estimate.high))
for c, d in zip(*np.triu_indices(CLASSES, 1), strict=True):
  interval = f'[{low[c, d]:.2f}, {high[c, d]:.2f}]'
  print(f'classes {c} and {d} on new data: {estimate.cosine()[c, d]:.2f} {interval}')

# sphinx_gallery_thumbnail_path = '_static/examples/equinox_mlp.png'
