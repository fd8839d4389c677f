"""Second stages: what of a trained net is trained again, in one visible table.

A net trained on the long tail as it is has good features and a biased classifier (Kang et al.
2020): a second stage keeps the features, with the statistics of their norms, and corrects the
classifier alone. (The code of Kang et al. lets the norms go on with the statistics of
class-balanced batches; MiSLAS's for CIFAR-10 keeps them.) How one starts from the first stage's
workdir: `csba_jax.training.start_second_stage`.
"""

import re
from typing import Any, NamedTuple

import ml_collections

from csba_jax.errors import UserError

PyTree = Any


class Stage(NamedTuple):
  """A row of STAGES; the expressions search the names of parameters, such as head/kernel."""

  trains: str | None  # what it trains; None: nothing
  fresh: str | None = None  # what starts anew; all else comes from the first stage
  head: str | None = None  # the model.head that it needs; None: any


STAGES = {
  # not a second stage: everything, from nothing
  'none': Stage(trains='.', fresh='.'),
  # classifier re-training (Kang et al. 2020): a new classifier on the old features
  'crt': Stage(trains='^head/', fresh='^head/'),
  # learnable weight scaling (Kang et al. 2020): a factor for each class's logit, nothing else
  'lws': Stage(trains='^head/scale$', fresh='^head/scale$', head='scaled'),
  # MiSLAS's second stage (Zhong et al. 2021): the first stage's classifier goes on, with a factor
  # for each class, under label_aware_smoothing
  'label_aware': Stage(trains='^head/', fresh='^head/scale$', head='scaled'),
  # tau-normalisation (Kang et al. 2020): w_k / |w_k|^tau, no training at all
  'tau_norm': Stage(trains=None, head='linear'),
}


def find(stage: ml_collections.ConfigDict, head: str) -> Stage:
  """The row of config.stage, for a model with that kind of classifier.

  Raises:
    UserError: an unknown method, or one that this classifier does not fit.
  """
  if stage.method not in STAGES:
    raise UserError(
      f'stage.method among {", ".join(STAGES)}', repr(stage.method), 'set --config.stage.method'
    )
  found = STAGES[stage.method]
  if found.head not in (None, head):
    raise UserError(
      f'model.head {found.head} for stage.method {stage.method}',
      repr(head),
      f'set --config.model.head={found.head}',
    )
  return found


def check_source(stage: ml_collections.ConfigDict) -> None:
  """Raises UserError for a second stage without a first one, and for the reverse."""
  if (stage.method == 'none') != (stage.source == ''):
    raise UserError(
      'stage.method and stage.source together: what to do, and the workdir of the first stage',
      f'method {stage.method!r}, source {stage.source!r}',
      'set --config.stage.source=WORKDIR, or --config.stage.method=none without a source',
    )


def matches(pattern: str | None, params: PyTree) -> PyTree:
  """True for the parameters whose names the expression finds; a tree like `params`."""
  import jax  # not above: the index streams of the host, which know stages, do without it

  def one(path, _):
    name = '/'.join(str(key.key) for key in path)
    return pattern is not None and re.search(pattern, name) is not None

  return jax.tree.map_with_path(one, params)
