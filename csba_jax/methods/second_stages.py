"""Second stages: which part of a trained net is trained again, in one visible table.

A net that was trained on long-tailed data has good features and a biased classifier (Kang et al.
2020). A second stage keeps the features, with the statistics of BatchNorm, and corrects the
classifier alone. (In the code of Kang et al. the statistics follow the class-balanced batches of
the second stage; MiSLAS's code for CIFAR-10 keeps them.) How a second stage starts from the workdir
of the first: `csba_jax.training.start_second_stage`.
"""

import re
from typing import Any, NamedTuple

import ml_collections

from csba_jax.errors import UserError

PyTree = Any


class SecondStage(NamedTuple):
  """A row of SECOND_STAGES; its regular expressions search parameter names, e.g. head/kernel."""

  trains: str | None  # parameters that are trained; None: none
  fresh: str | None = None  # parameters that start anew; the others come from the first stage
  classifier: str | None = None  # the model.head that it needs; None: any
  updates_statistics: bool = False  # whether BatchNorm takes and averages those of the batches


SECOND_STAGES = {
  # no second stage: everything is trained, from its initial value
  'none': SecondStage(trains='.', fresh='.', updates_statistics=True),
  # classifier re-training (Kang et al. 2020): a new classifier on the old features
  'crt': SecondStage(trains='^head/', fresh='^head/'),
  # learnable weight scaling (Kang et al. 2020): a factor for the logit of each class, nothing else
  'lws': SecondStage(trains='^head/scale$', fresh='^head/scale$', classifier='scaled'),
  # second stage of MiSLAS (Zhong et al. 2021): the classifier of the first stage, with a factor for
  # each class, is trained further under label_aware_smoothing; here with one learning rate, and
  # without weight decay of the factors (their code halves the rate of the classifier on CIFAR, and
  # decays the factors)
  'label_aware': SecondStage(trains='^head/', fresh='^head/scale$', classifier='scaled'),
  # tau-normalisation (Kang et al. 2020): w_k / |w_k|^tau, without any training
  'tau_norm': SecondStage(trains=None, classifier='linear'),
}


def find(stage: ml_collections.ConfigDict, classifier: str) -> SecondStage:
  """The row that config.stage names, for a net whose classifier is of that kind (model.head).

  Raises:
    UserError: an unknown method, or one that this classifier does not fit.
  """
  if stage.method not in SECOND_STAGES:
    raise UserError(
      f'stage.method among {", ".join(SECOND_STAGES)}',
      repr(stage.method),
      'set --config.stage.method',
    )
  found = SECOND_STAGES[stage.method]
  if found.classifier not in (None, classifier):
    raise UserError(
      f'model.head {found.classifier} for stage.method {stage.method}',
      repr(classifier),
      f'set --config.model.head={found.classifier}',
    )
  return found


def updates_statistics(config: ml_collections.ConfigDict) -> bool:
  """Whether BatchNorm takes the statistics of each batch, and averages them, once all layers move.

  Not in a second stage that keeps them, and not with pretrained weights that never move.
  """
  never_moves = config.model.init != '' and config.train.frozen == 1
  return find(config.stage, config.model.head).updates_statistics and not never_moves


def check_source(stage: ml_collections.ConfigDict) -> None:
  """Raises UserError for a second stage without a first one, or a first one without a second."""
  if (stage.method == 'none') != (stage.source == ''):
    raise UserError(
      'stage.method and stage.source together: what to do, and the workdir of the first stage',
      f'method {stage.method!r}, source {stage.source!r}',
      'set --config.stage.source=WORKDIR, or --config.stage.method=none without a source',
    )


def matches(pattern: str | None, params: PyTree) -> PyTree:
  """True for parameters in whose names the regular expression is found; a tree like `params`."""
  import jax  # not above: the plan of a run (run.schedule) reads this table without JAX

  def one(path: tuple[jax.tree_util.DictKey, ...], _: object) -> bool:
    name = '/'.join(str(key.key) for key in path)
    return pattern is not None and re.search(pattern, name) is not None

  return jax.tree.map_with_path(one, params)
