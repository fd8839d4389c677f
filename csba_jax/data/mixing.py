"""Mixing of images on the device: (key, batch, step) -> batch, in one visible table.

A mixed image stands for two labels: `label` with the weight `share` and `partner_label` with the
rest, see `csba_jax.methods.losses.mixed`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from csba_jax.config import step_at
from csba_jax.data import sampling
from csba_jax.errors import UserError

Batch = Mapping[str, Array]
MixFn = Callable[[Array, Batch, Array | int], Batch]


def mixup(key: Array, batch: Batch, *, class_counts: np.ndarray, alpha: float) -> Batch:
  """lam x_i + (1 - lam) x_j, share lam ~ Beta(alpha, alpha), one a batch (Zhang et al. 2018)."""
  del class_counts
  lam = jax.random.beta(key, alpha, alpha)
  image = lam * batch['image'] + (1 - lam) * batch['partner_image']
  return {'image': image, 'share': _for_all(lam, batch)}


def remix(
  key: Array, batch: Batch, *, class_counts: np.ndarray, alpha: float, kappa: float, tau: float
) -> Batch:
  """Images as in `mixup`; the label goes to the rarer class where the numbers differ by kappa.

  share = 0 if n_i / n_j >= kappa and lam < tau;  1 if n_i / n_j <= 1 / kappa and 1 - lam < tau;
  lam otherwise (Chou et al. 2020).
  """
  mixed = mixup(key, batch, class_counts=class_counts, alpha=alpha)
  lam = mixed['share']
  counts = jnp.asarray(class_counts, jnp.float32)
  ratio = counts[batch['label']] / counts[batch['partner_label']]
  share = jnp.where((ratio >= kappa) & (lam < tau), 0.0, lam)
  share = jnp.where((ratio <= 1 / kappa) & (1 - lam < tau), 1.0, share)
  return mixed | {'share': share}


def cutmix(key: Array, batch: Batch, *, class_counts: np.ndarray, alpha: float) -> Batch:
  """A box of x_j pasted into x_i, share = what is left of x_i (Yun et al. 2019).

  The box has sides int(side sqrt(1 - lam)), lam ~ Beta(alpha, alpha), and its centre anywhere;
  what falls outside is cut off, and the share is of the pixels. One box a batch.
  """
  del class_counts
  lam_key, row_key, column_key = jax.random.split(key, 3)
  height, width = batch['image'].shape[1:3]
  side = jnp.sqrt(1 - jax.random.beta(lam_key, alpha, alpha))
  rows = _stretch(row_key, height, side)
  columns = _stretch(column_key, width, side)
  box = rows[:, None] & columns[None, :]
  image = jnp.where(box[None, :, :, None], batch['partner_image'], batch['image'])
  return {'image': image, 'share': _for_all(1 - box.mean(dtype=jnp.float32), batch)}


def _stretch(key: Array, size: int, share: Array) -> Array:
  """Places within int(size * share) / 2 of a random one.   -> [size] bool"""
  length = (size * share).astype(jnp.int32)
  centre = jax.random.randint(key, (), 0, size)
  place = jnp.arange(size)
  return (place >= centre - length // 2) & (place < centre + length // 2)


def _for_all(share: Array, batch: Batch) -> Array:
  return jnp.full(batch['label'].shape, share, jnp.float32)


class Kind(NamedTuple):
  """A row of MIXINGS."""

  function: Callable[..., Batch] | None  # -> {'image', 'share'}; None: nothing is mixed
  options: tuple[str, ...] = ()  # fields of config.mixing that it takes
  partner: str | None = None  # sampler of the partners; None: the batch itself in another order


MIXINGS: Mapping[str, Kind] = {
  'none': Kind(None),
  'mixup': Kind(mixup, ('alpha',)),
  'remix': Kind(remix, ('alpha', 'kappa', 'tau')),
  'cutmix': Kind(cutmix, ('alpha',)),
  # CMO (Park et al. 2022): patches of images in which the rare classes are as common as the others,
  # on images as they come. The paper's text weighs classes by 1 / n_c; its code, and this, images.
  'cmo': Kind(cutmix, ('alpha',), partner='class'),
}


def kind_of(name: str) -> Kind:
  """The row of MIXINGS, or a UserError that lists them."""
  if name not in MIXINGS:
    raise UserError(
      f'mixing.name among {", ".join(MIXINGS)}', repr(name), 'set --config.mixing.name'
    )
  return MIXINGS[name]


def partners(mixing: ml_collections.ConfigDict, stream: sampling.Stream) -> sampling.Stream | None:
  """The stream that the partners of a batch come from; None: from the batch itself."""
  name = kind_of(mixing.name).partner
  if name is None:
    return None
  return sampling.Stream(
    name, 0, stream.labels, stream.batch_size, stream.total_steps, stream.seed, 'partner'
  )


def build(mixing: ml_collections.ConfigDict, class_counts: np.ndarray, total_steps: int) -> MixFn:
  """What config.mixing describes: (key, batch, step) -> batch.

  The batch holds 'image' [N, H, W, ch] float32 and 'label' [N], and 'partner_image' and
  'partner_label' where they have a stream of their own. From the share `start` of the run to `stop`
  a batch is mixed with the probability config.mixing.probability. It comes back with 'image',
  'label', 'partner_label' and 'share' [N] in [0, 1]; without mixing as it is.
  """
  kind = kind_of(mixing.name)
  options = {name: mixing[name] for name in kind.options}
  counts = np.asarray(class_counts, np.float64)
  probability = mixing.probability
  first, end = step_at(mixing.start, total_steps), step_at(mixing.stop, total_steps)

  def mix(key: Array, batch: Batch, step: Array | int) -> Batch:
    if kind.function is None:
      return batch
    order_key, use_key, mix_key = jax.random.split(key, 3)
    if kind.partner is None:
      order = jax.random.permutation(order_key, len(batch['label']))
      own = {'partner_image': batch['image'][order], 'partner_label': batch['label'][order]}
      batch = {**batch, **own}
    mixed = kind.function(mix_key, batch, class_counts=counts, **options)
    use = jax.random.bernoulli(use_key, probability) & (step >= first) & (step < end)
    return {
      'image': jnp.where(use, mixed['image'], batch['image']),
      'label': batch['label'],
      'partner_label': batch['partner_label'],
      'share': jnp.where(use, mixed['share'], 1.0),
    }

  return mix
