"""
An NNX mixer on tokens, layer by layer
======================================

The conflict matrix and the gradient flow of an MLP-mixer, on sequences of tokens.

A ``layer_fn`` joins the parameters of each mixing step into one layer. In each of these layers the
gradient flow compares the large classes with the small ones.
"""

import jax
import numpy as np
import optax
from flax import nnx

from csba_jax.gradients import Conflict, class_grams, plots
from csba_jax.gradients.flow import flow

# %%
# The data: each class has a sequence of its own, and most of its tokens are replaced at random.

COUNTS = (300, 150, 75, 36, 18, 9)
CLASSES, LENGTH, VOCABULARY, WIDTH = len(COUNTS), 16, 24, 32
rng = np.random.default_rng(0)
label = np.repeat(np.arange(CLASSES), COUNTS)
noise = rng.integers(VOCABULARY, size=(len(label), LENGTH))
of_class = rng.integers(VOCABULARY, size=(CLASSES, LENGTH))[label]
data = {'tokens': np.where(rng.random(noise.shape) < 0.7, noise, of_class), 'label': label}

# %%
# The model.


class Mix(nnx.Module):
  """A residual MLP over the last axis.   [..., size] -> [..., size]"""

  def __init__(self, size, rngs):
    self.norm = nnx.LayerNorm(size, rngs=rngs)
    self.up, self.down = nnx.Linear(size, 64, rngs=rngs), nnx.Linear(64, size, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Mixer(nnx.Module):
  """Mixes channels and tokens in turn.   [N, LENGTH] -> [N, CLASSES]"""

  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.mixes = nnx.List([Mix(size, rngs) for size in 2 * (WIDTH, LENGTH)])
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for mix in self.mixes:  # channels, tokens, channels, tokens
      x = mix(x).swapaxes(1, 2)
    return self.head(x.mean(1))


# %%
# ``nnx.split`` gives the parameters as an ``nnx.State``. That is a tree of arrays, and so it can be
# the ``params`` of ``losses_fn``.

graph, params = nnx.split(nnx.jit(lambda: Mixer(nnx.Rngs(0)))())


def losses_fn(params, batch):
  logits = nnx.merge(graph, params)(batch['tokens'])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])


# %%
# An ordinary training.

optimizer = optax.adam(3e-3)


@jax.jit
def train_step(params, state):
  loss, grads = jax.value_and_grad(lambda params: losses_fn(params, data).mean())(params)
  updates, state = optimizer.update(grads, state)
  return optax.apply_updates(params, updates), state, loss


state, losses = optimizer.init(params), []
for _ in range(40):
  params, state, loss = train_step(params, state)
  losses.append(float(loss))

# %%
# The matrix. Here ``mixes/0/up/kernel`` belongs to the layer ``mixes/0``, and ``head/bias`` to
# ``head``.
#
# .. image:: /_static/examples/token_mixer.png
#    :alt: Heat map of the conflict matrix


def layer_of(name):
  return '/'.join(name.split('/')[:-1][:2])


grams = class_grams(
  losses_fn,
  params,
  data,
  num_classes=CLASSES,
  layer_fn=layer_of,
  head='^head/',
  per_example=True,
)
conflict = Conflict.of(grams, about={'target': 'train, exact'})
plots.heat_map(conflict, 'token_mixer.png')
print(conflict.cosine().round(2))

# %%
# The gradient flow: how long the class gradients of the large classes are, and how hard these
# classes pull together, each divided by the same number of the small classes.
#
# .. image:: /_static/examples/token_mixer_flow.png
#    :alt: Gradient flow by layer

flows = flow(conflict)
plots.gradient_flow(conflict, flows, 'token_mixer_flow.png')
for scope, norms, pulls in zip(flows.scopes, flows.norm_ratio, flows.pull_ratio, strict=True):
  print(f'{scope:12} large / small classes: |g_c| {norms:.2f}, |sum of pi_c g_c| {pulls:.2f}')

# sphinx_gallery_thumbnail_path = '_static/examples/token_mixer.png'
