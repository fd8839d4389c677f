"""Conflict matrix and gradient flow of an MLP-mixer in NNX, on sequences of tokens.

`nnx.split` gives the parameters as an `nnx.State`, which is the `params` that `losses_fn` takes. A
`layer_fn` joins the parameters of each mixing step into one layer, and the gradient flow compares
the large classes with the small ones in each.

  python examples/token_mixer.py [token_mixer.png]
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx

from csba_jax.gradients import Conflict, class_grams, plots
from csba_jax.gradients.flow import flow

COUNTS = (300, 150, 75, 36, 18, 9)
CLASSES, LENGTH, VOCABULARY, WIDTH = len(COUNTS), 16, 24, 32


class Mix(nnx.Module):
  def __init__(self, size, rngs):
    self.norm = nnx.LayerNorm(size, rngs=rngs)
    self.up, self.down = nnx.Linear(size, 64, rngs=rngs), nnx.Linear(64, size, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Mixer(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.mixes = nnx.List([Mix(size, rngs) for size in 2 * (WIDTH, LENGTH)])
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for mix in self.mixes:  # channels, tokens, channels, tokens
      x = mix(x).swapaxes(1, 2)
    return self.head(x.mean(1))


def main(path='token_mixer.png'):
  rng = np.random.default_rng(0)
  label = np.repeat(np.arange(CLASSES), COUNTS)
  noise = rng.integers(VOCABULARY, size=(len(label), LENGTH))
  of_class = rng.integers(VOCABULARY, size=(CLASSES, LENGTH))[label]  # a sequence for each class
  data = {'tokens': np.where(rng.random(noise.shape) < 0.7, noise, of_class), 'label': label}

  optimizer, losses = optax.adam(3e-3), []
  graph, params = nnx.split(nnx.jit(lambda: Mixer(nnx.Rngs(0)))())

  def losses_fn(params, batch):
    logits = nnx.merge(graph, params)(batch['tokens'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  @jax.jit
  def train_step(params, state):
    loss, grads = jax.value_and_grad(lambda params: losses_fn(params, data).mean())(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for _ in range(40):
    params, state, loss = train_step(params, state)
    losses.append(float(loss))

  # 'mixes/0/up/kernel' becomes 'mixes/0', and 'head/bias' becomes 'head'
  args = {'layer_fn': lambda name: '/'.join(name.split('/')[:-1][:2]), 'head': '^head/'}
  args |= {'num_classes': CLASSES, 'per_example': True}
  found = class_grams(losses_fn, params, data, **args)
  conflict = Conflict.of(found, about={'target': 'train, exact'})
  plots.heat_map(conflict, path)
  print(conflict.cosine().round(2))
  flows = flow(conflict)
  for scope, norms, pulls in zip(flows.scopes, flows.norm_ratio, flows.pull_ratio, strict=True):
    print(f'{scope:12} large / small classes: |g_c| {norms:.2f}, |sum of pi_c g_c| {pulls:.2f}')
  return conflict, losses


if __name__ == '__main__':
  main(*sys.argv[1:2])
