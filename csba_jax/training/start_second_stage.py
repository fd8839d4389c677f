"""The start of a second stage: the net of a first stage's workdir, with a prepared classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.measure.evaluate import evaluate
from csba_jax.methods import metrics, second_stages
from csba_jax.run import restore
from csba_jax.run.net import Net
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import read_result
from csba_jax.runtime import sharding
from csba_jax.runtime.progress import say

PyTree = Any
TAUS = tuple(round(0.1 * i, 1) for i in range(21))  # as in the code of Kang et al. 2020
# fields of data and model that may change from stage to stage: the place of the data, and the kind
# of classifier
FREE = ('data.dir', 'data.cache_dir', 'model.head')


def start(
  model: nn.Module, initial: TrainState, config: ml_collections.ConfigDict, data: pipeline.Data
) -> tuple[TrainState, dict[str, Any]]:
  """The state in which a second stage begins, and what result.json says about it.

  Args:
    model: of the second stage.
    initial: state of the model, freshly initialised; the parameters that the stage trains from
      scratch are taken from it.
    config: of the second stage; config.stage names the method and the first stage.
    data: of the second stage.

  Raises:
    UserError: there is no first stage, or it is not finished, or has another model or other data.
  """
  _check_same(config)
  if config.stage.checkpoint == 'best':
    read_result(config.stage.source)  # only a finished run knows which one is the best
  layout = sharding.Layout.of(initial)
  source = restore.load_run(config.stage.source, config.stage.checkpoint, data=data, layout=layout)
  stage = second_stages.SECOND_STAGES[config.stage.method]
  first = source.net
  old = _without_scale(first.params)
  params = _take_over(initial.params, old, second_stages.matches(stage.fresh, initial.params))
  about = {
    'method': config.stage.method,
    'source': str(source.workdir),
    'source_step': first.step,
  }
  state = initial.replace(params=params, batch_stats=first.batch_stats)
  if config.stage.method == 'tau_norm':
    net = Net.of(model, state.replace(averages={}), first.metadata, config.loss.post_hoc_tau)
    tau = config.stage.tau if config.stage.tau >= 0 else best_tau(net, config, data)
    state = state.replace(params=tau_normalised(params, tau))
    about['tau'] = tau
  if state.averages:
    averages = {'params': state.params, 'batch_stats': state.batch_stats}
    state = state.replace(averages=jax.tree.map(jnp.copy, averages))
  return state, about


def tau_normalised(params: PyTree, tau: float) -> PyTree:
  """w_k <- w_k / |w_k|^tau and no bias, for the classifier `head` (Kang et al. 2020).

  w_k is the whole row of class k, over branches and channels. tau = 0 changes only the bias.
  """
  kernel = params['head']['kernel']  # [..., C]
  norms = jnp.sqrt((kernel * kernel).sum(tuple(range(kernel.ndim - 1)), keepdims=True))
  head = {'kernel': kernel / jnp.maximum(norms, 1e-12) ** tau}
  head |= {'bias': jnp.zeros_like(params['head']['bias'])}
  return {**params, 'head': {**params['head'], **head}}


def best_tau(net: Net, config: ml_collections.ConfigDict, data: pipeline.Data) -> float:
  """The tau of TAUS with the best balanced accuracy on the validation part; of equals the smallest.

  The score is not macro-F1: the validation part has the prior of the long tail, and precision under
  that prior is best for a tau that leaves the prior as it is.

  Raises:
    UserError: there is no validation part.
  """
  if not len(data.val):
    raise UserError(
      'stage.tau >= 0 where there is no validation part to choose it on',
      str(config.stage.tau),
      'set --config.stage.tau=1, or data.val_fraction in both stages',
    )
  scores = []
  for tau in TAUS:
    normalised = net.replace(params=tau_normalised(net.params, tau))
    sums = evaluate(normalised, data.val, config.train.batch_size)
    scores.append(metrics.summarise(sums, data.class_counts)['balanced_accuracy'])
  best = TAUS[int(np.argmax(scores))]
  say(f'tau {best} by validation balanced accuracy {max(scores):.4f} (tau 0: {scores[0]:.4f})')
  return best


def _without_scale(params: PyTree) -> PyTree:
  """The same net, with the factors of a `scaled` classifier multiplied into kernel and bias."""
  head = dict(params['head'])
  scale = head.pop('scale', None)
  if scale is None:
    return params
  by_class = scale.reshape((1,) * (head['kernel'].ndim - 1) + (-1,))
  head |= {'kernel': head['kernel'] * by_class, 'bias': head['bias'] * scale}
  return {**params, 'head': head}


def _take_over(fresh: PyTree, old: PyTree, is_fresh: PyTree) -> PyTree:
  """`fresh` where `is_fresh`, else `old`; parameters that only `old` has are dropped."""
  old = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(old)}

  def choose(path: jax.tree_util.KeyPath, leaf: jax.Array, new: bool) -> jax.Array:
    return leaf if new else old[jax.tree_util.keystr(path)]

  return jax.tree.map_with_path(choose, fresh, is_fresh)


def _check_same(config: ml_collections.ConfigDict) -> None:
  """Raises UserError unless the first stage has this model and this data.

  `restore.load_run` checks that the images are the same ones.
  """

  def fixed(whole: ml_collections.ConfigDict) -> dict[str, Any]:
    flat = config_lib.flatten(whole)
    return {k: v for k, v in flat.items() if k.split('.')[0] in ('data', 'model') and k not in FREE}

  there = restore.config_of(config.stage.source)
  different = config_lib.differences(fixed(there), fixed(config))
  heads = (there.model.head, config.model.head)
  if 'cosine' in heads and heads[0] != heads[1]:
    different.append(f'model.head: {heads[0]!r} there, {heads[1]!r} here')
  if different:
    raise UserError(
      f'the model and the data of the first stage {config.stage.source}',
      '; '.join(different),
      'set these fields as in the first stage',
    )
