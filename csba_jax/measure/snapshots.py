"""Snapshots of a run in training: conflict and branch similarity over its parts."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array
from jax.tree_util import Partial

from csba_jax.data import pipeline
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import branch_similarity, diagnose, training_conflict
from csba_jax.measure.diagnose import Sampling
from csba_jax.measure.training_conflict import Batches
from csba_jax.run.net import Net
from csba_jax.runtime import sharding


def snapshot(
  net: Net,
  in_training: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  check: Callable[[], None] = lambda: None,
  known: Mapping[str, tuple[Conflict, Any]] = MappingProxyType({}),
) -> dict[str, tuple[Conflict, dict[str, Any]]]:
  """The conflict and the branch similarity of a net over its parts.

  Conflict is that of `diagnostics.batches` batches or of every image, as `training_conflict.choose`
  says for `diagnostics.statistics`. Branch similarity is that of every image.

  Args:
    net: as it is evaluated; in training, with statistics that were renewed.
    in_training: the same net with the parameters that training moves; another one where the run
      keeps moving averages.
    config: of its run.
    data: of its run.
    check: called now and then; may raise.
    known: what this function gave for the same parameters at the same step. The conflict of
      batches is taken from it: it has the statistics of its batches or, where training keeps the
      running ones, those.

  Returns:
    {'train': (conflict, `branch_similarity.measure`)}, and 'val' likewise where the run has a
    validation part.
  """
  kind = training_conflict.choose(config.diagnostics.statistics, net, config)
  batches = Batches(config.diagnostics.batches, config.seed)
  found = {}
  for name, part in (('train', data.train), ('val', data.val)):
    if not len(part):
      continue
    if kind == 'batch' and name in known:
      conflict, _ = known[name]
    elif kind == 'batch':
      conflict = training_conflict.measure(
        in_training, config, data, part, batches, tick=lambda *_: check()
      )
    else:
      about, sample = {'target': f'{name}, exact'}, Sampling(exact=True)
      conflict = diagnose.measure(
        net, config, data, part, sample, tick=lambda *_: check(), about=about
      )
    branches = branch_similarity.measure(net, part, config.train.batch_size, check)
    found[name] = conflict, branches
  return found


def training_loss(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  check: Callable[[], None] = lambda: None,
) -> float:
  """Mean loss over every training image, as `snapshot` measures it: no class weights, no mixing."""
  layout, total = net.layout, 0.0
  losses_fn = Partial(diagnose.losses_of(net, config), net.batch_stats)
  for images, labels, mask in pipeline.eval_batches(data.train, config.train.batch_size, layout):
    check()
    total += float(_loss_sum(losses_fn, net.params, images, labels, mask, layout=layout))
  return total / len(data.train)


@functools.partial(jax.jit, static_argnames='layout')
def _loss_sum(
  losses_fn: Partial,
  params: Any,
  images: Array,
  labels: Array,
  mask: Array,
  *,
  layout: sharding.Layout,
) -> Array:
  losses_fn, params = layout.gather((losses_fn, params))
  found = losses_fn(params, {'image': images, 'label': labels})
  return layout.gather(jnp.where(mask, found, 0).sum())
