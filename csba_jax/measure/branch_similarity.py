"""How similar the features of branches are, and how much gates differ between classes.

arXiv 2606.05740 names "implicit feature decoupling across branches" as the mechanism of CSBA.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from csba_jax.data import pipeline
from csba_jax.run.net import Net, Preprocessing
from csba_jax.runtime import sharding


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
  """Debiased linear CKA, HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)), K = x x^T, L = y y^T.

  CKA of Kornblith et al. 2019, with the unbiased HSIC of Song et al. 2012 in all three places:
  plain CKA tends to 1 where there are more features than images. Computed in O(N D E).

  Args:
    x: [N, D], N >= 4.
    y: [N, E].

  Returns:
    1 for features that are equal up to rotation, scale and shift; around 0, also below 0, for
    independent features; NaN where x or y does not vary, or with fewer than 4 images.
  """
  if len(x) < 4:
    return float('nan')
  x, y = (np.asarray(z, np.float64) - np.asarray(z, np.float64).mean(0) for z in (x, y))
  within = _hsic(x, x) * _hsic(y, y)
  scale = (np.square(x).sum() * np.square(y).sum() / len(x) ** 2) ** 2  # of `within`, to compare
  return float(_hsic(x, y) / np.sqrt(within)) if within > 1e-12 * scale > 0 else float('nan')


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
  """HSIC_1 of linear kernels (Song et al. 2012, eq. 5) times N (N - 3), from centred features."""
  n = len(x)
  own_x, own_y = np.square(x).sum(1), np.square(y).sum(1)  # diagonals, which are left out
  rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
  trace = np.square(x.T @ y).sum() - own_x @ own_y
  return trace + rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 * rows_x @ rows_y / (n - 2)


def measure(
  net: Net, part: pipeline.Part, batch_size: int, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
  """Similarity of branches, and gates by class, over a part of the data.

  The features of a branch are the spatial means of what the block aggregates, after the gate where
  there is one. BatchNorm uses its running statistics.

  Args:
    net: is measured on the devices where its variables are.
    part: N images.
    batch_size: images at a time.
    tick: called before each batch; may raise.

  Returns:
    Plain numbers:
    'cka' {block: [B, B] of `linear_cka`};
    'gates' {block: [B, C] mean gate over the images of each class and all channels}, and for
    `csba_class` the block 'head': the gates of logit c over the images of class c;
    'gate_spread' {block: standard deviation over classes of the mean gate of a channel, mean over
    channels and branches}.
    A net without branches or gates has empty entries; an absent class has NaN.
  """
  found: dict[str, list[np.ndarray]] = {}
  layout, num_classes = net.layout, net.num_classes
  for images, *_ in pipeline.eval_batches(part, batch_size, layout):
    tick()
    kept = jax.device_get(
      _intermediates(net.model, net.metadata.preprocessing, net.variables, images, layout)
    )
    for name, (values,) in flatten_dict(kept, sep='/').items():
      found.setdefault(name, []).append(values)
  whole = {
    name: np.concatenate(batches)[: len(part)].astype(np.float64)  # the last batch is padded
    for name, batches in found.items()
  }
  result: dict[str, Any] = {'cka': {}, 'gates': {}, 'gate_spread': {}}
  for name, values in whole.items():
    block, _, kind = name.rpartition('/')
    if kind == 'branches':
      branches = range(values.shape[1])
      result['cka'][block] = [
        [linear_cka(values[:, a], values[:, b]) for b in branches] for a in branches
      ]
    elif kind == 'gates':
      block = block.removesuffix('/attention')
      of_class = _class_means(values, part.labels, num_classes)  # [C, B, D]
      result['gates'][block] = of_class.mean(-1).T.tolist()
      result['gate_spread'][block] = _spread(of_class)
    else:  # class_gates [N, K, B]: what logit c sees of images of class c
      own = values[np.arange(len(values)), part.labels]
      result['gates'][block] = _class_means(own, part.labels, num_classes).T.tolist()
  return result


@functools.partial(jax.jit, static_argnames=('model', 'preprocessing', 'layout'))
def _intermediates(
  model: nn.Module,
  preprocessing: Preprocessing,
  variables: Mapping[str, Any],
  images: Array,
  layout: sharding.Layout,
) -> Any:
  """The values that the layers of a net keep in a forward pass, {layer: {name: ([N, ...],)}}."""
  variables = layout.gather(variables)
  _, kept = model.apply(variables, preprocessing(images), train=False, mutable=['intermediates'])
  return layout.gather(kept.get('intermediates', {}))


def _class_means(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Mean over the examples of each class, NaN for an absent one.   [N, ...] -> [C, ...]"""
  means = np.full((num_classes, *values.shape[1:]), np.nan)
  for c in np.unique(labels):
    means[c] = values[labels == c].mean(0)
  return means


def _spread(of_class: np.ndarray) -> float:
  """Standard deviation over the present classes, then the mean over all other axes.   [C, ...]"""
  there = of_class[~np.isnan(of_class).any(tuple(range(1, of_class.ndim)))]
  return float(there.std(0).mean()) if len(there) > 1 else float('nan')
