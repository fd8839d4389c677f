"""Mixing of images on the device: (key, batch, step) -> batch, in one visible table.

A mixed image has two labels: `label` with the weight `share`, and `partner_label` with the weight
1 - share; see `csba_jax.methods.losses.mixed`.
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


def mixup(key: Array, batch: Batch, *, alpha: float) -> dict[str, Array]:
  """lam x_i + (1 - lam) x_j, share = lam ~ Beta(alpha, alpha), one lam a batch.

  Zhang et al. 2018.
  """
  lam = jax.random.beta(key, alpha, alpha)
  image = lam * batch['image'] + (1 - lam) * batch['partner_image']
  return {'image': image, 'share': _for_all(lam, batch)}


def remix(
  key: Array, batch: Batch, *, class_counts: np.ndarray, alpha: float, kappa: float, tau: float
) -> Batch:
  """Images as in `mixup`; the rarer class gets the whole label where counts differ by kappa.

  share = 0 if n_i / n_j >= kappa and lam < tau;  1 if n_i / n_j <= 1 / kappa and 1 - lam < tau;
  lam otherwise (Chou et al. 2020).
  """
  mixed = mixup(key, batch, alpha=alpha)
  lam = mixed['share']
  counts = jnp.asarray(class_counts, jnp.float32)
  ratio = counts[batch['label']] / counts[batch['partner_label']]
  share = jnp.where((ratio >= kappa) & (lam < tau), 0.0, lam)
  share = jnp.where((ratio <= 1 / kappa) & (1 - lam < tau), 1.0, share)
  return mixed | {'share': share}


def cutmix(key: Array, batch: Batch, *, alpha: float) -> Batch:
  """A box of x_j is pasted into x_i; share = part of the pixels that x_i keeps (Yun et al. 2019).

  The sides of the box are int(side sqrt(1 - lam)), lam ~ Beta(alpha, alpha). Its centre may be
  anywhere in the image, and what lies outside is cut off. All images of a batch have the same box.
  """
  lam_key, row_key, column_key = jax.random.split(key, 3)
  height, width = batch['image'].shape[1:3]
  side = jnp.sqrt(1 - jax.random.beta(lam_key, alpha, alpha))
  rows = _stretch(row_key, height, side)
  columns = _stretch(column_key, width, side)
  box = rows[:, None] & columns[None, :]
  image = jnp.where(box[None, :, :, None], batch['partner_image'], batch['image'])
  return {'image': image, 'share': _for_all(1 - box.mean(dtype=jnp.float32), batch)}


def _stretch(key: Array, size: int, share: Array) -> Array:
  """Which positions lie within int(size * share) / 2 of a random centre.   -> [size] bool"""
  length = (size * share).astype(jnp.int32)
  centre = jax.random.randint(key, (), 0, size)
  place = jnp.arange(size)
  return (place >= centre - length // 2) & (place < centre + length // 2)


def _for_all(share: Array, batch: Batch) -> Array:
  return jnp.full(batch['label'].shape, share, jnp.float32)


class Mixing(NamedTuple):
  """A row of MIXINGS."""

  # (key, batch, **options) -> {'image', 'share'}; None: nothing is mixed
  function: Callable[..., Batch] | None
  reads_counts: bool  # whether it takes class_counts [C] too; without, it cannot depend on them
  options: tuple[str, ...] = ()  # fields of config.mixing that it takes
  partner: str | None = None  # sampler of the partners; None: the batch itself in another order


MIXINGS: Mapping[str, Mixing] = {
  'none': Mixing(None, reads_counts=False),
  'mixup': Mixing(mixup, reads_counts=False, options=('alpha',)),
  'remix': Mixing(remix, reads_counts=True, options=('alpha', 'kappa', 'tau')),
  'cutmix': Mixing(cutmix, reads_counts=False, options=('alpha',)),
  # CMO (Park et al. 2022): patches from a stream in which all classes are equally frequent, pasted
  # into images in their natural frequency. The text of the paper weights classes by 1 / n_c; its
  # code weights images by 1 / n_c, and so does this.
  'cmo': Mixing(cutmix, reads_counts=False, options=('alpha',), partner='class'),
}


def find(name: str) -> Mixing:
  """The row of MIXINGS, or a UserError that lists them."""
  if name not in MIXINGS:
    raise UserError(
      f'mixing.name among {", ".join(MIXINGS)}', repr(name), 'set --config.mixing.name'
    )
  return MIXINGS[name]


def partners(mixing: ml_collections.ConfigDict, stream: sampling.Stream) -> sampling.Stream | None:
  """The stream that the partners of a batch come from; None: they come from the batch itself."""
  name = find(mixing.name).partner
  if name is None:
    return None
  return sampling.Stream(
    name, 0, stream.labels, stream.batch_size, stream.total_steps, stream.seed, 'partner'
  )


def build(mixing: ml_collections.ConfigDict, class_counts: np.ndarray, total_steps: int) -> MixFn:
  """The mixing that config.mixing describes: (key, batch, step) -> batch.

  The batch holds 'image' [N, H, W, ch] float32 and 'label' [N]; where partners have a stream of
  their own, also 'partner_image' and 'partner_label'. Between the shares `start` and `stop` of the
  run, a batch is mixed with the probability config.mixing.probability. The result holds 'image',
  'label', 'partner_label' and 'share' [N] in [0, 1]; with mixing 'none' it is the batch unchanged.
  """
  row = find(mixing.name)
  options = {name: mixing[name] for name in row.options}
  if row.reads_counts:
    options['class_counts'] = np.asarray(class_counts, np.float64)
  probability = mixing.probability
  first, end = step_at(mixing.start, total_steps), step_at(mixing.stop, total_steps)

  def mix(key: Array, batch: Batch, step: Array | int) -> Batch:
    if row.function is None:
      return batch
    order_key, use_key, mix_key = jax.random.split(key, 3)
    if row.partner is None:
      order = jax.random.permutation(order_key, len(batch['label']))
      own = {'partner_image': batch['image'][order], 'partner_label': batch['label'][order]}
      batch = {**batch, **own}
    mixed = row.function(mix_key, batch, **options)
    use = jax.random.bernoulli(use_key, probability) & (step >= first) & (step < end)
    return {
      'image': jnp.where(use, mixed['image'], batch['image']),
      'label': batch['label'],
      'partner_label': batch['partner_label'],
      'share': jnp.where(use, mixed['share'], 1.0),
    }

  return mix
