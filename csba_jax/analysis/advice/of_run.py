"""The evidence of a run, gathered from its folder and its validation images."""

import json
from pathlib import Path

import ml_collections

from csba_jax.analysis.advice.evidence import Evidence
from csba_jax.data.audit import JSON_FILE
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import evaluate
from csba_jax.measure.calibration import Validation
from csba_jax.methods import losses
from csba_jax.models import registry
from csba_jax.run import restore
from csba_jax.run.net import Metadata


def evidence_of(run: restore.Run, conflict: Conflict | None) -> Evidence:
  """What a run tells about its problems, at the checkpoint that it was loaded with.

  The test images are not looked at: what is chosen by them is not tested any more.

  Args:
    run: see `restore.load_run`.
    conflict: of its training images; None if it was not measured.
  """
  net, part = run.net, run.data.val
  validation = evaluate.validate(net, part, run.config.train.batch_size) if len(part) else None
  about = (net.metadata, run.config, validation, conflict, run.workdir)
  return evidence_from(*about, net.post_hoc_tau)


def evidence_from(
  metadata: Metadata,
  config: ml_collections.ConfigDict,
  validation: Validation | None,
  conflict: Conflict | None,
  workdir: Path,
  post_hoc_tau: float,
) -> Evidence:
  """The same from its parts.

  Args:
    metadata: of the net.
    config: of the run.
    validation: adjusted logits of the validation images.
    conflict: of the training images; None if it was not measured.
    workdir: folder of the run.
    post_hoc_tau: by which the logits are adjusted.
  """
  return Evidence(
    class_names=metadata.class_names,
    class_counts=metadata.class_counts,
    validation=validation,
    corrects=corrects_class_sizes(config),
    post_hoc_tau=post_hoc_tau,
    conflict=conflict,
    contradictions=_contradictions(workdir),
    can_have_csba=_can_have_csba(config.model),
  )


def _can_have_csba(model: ml_collections.ConfigDict) -> bool:
  if model.name not in registry.MODELS or model.attention in ('csba', 'csba_class'):
    return False
  return 'csba' in registry.attentions_of(model.name)


def corrects_class_sizes(config: ml_collections.ConfigDict) -> bool:
  """Whether anything in a config depends on how many images a class has."""
  return (
    losses.find(config.loss.name).reads_counts
    or config.loss.weights != 'none'
    or config.loss.post_hoc_tau > 0
    or config.sampler.name != 'instance'
    or config.stage.method != 'none'
  )


def _contradictions(workdir: Path) -> int:
  """Sets of copies in several classes, which the audit of csba-train --data has found."""
  try:
    return len(json.loads((workdir / JSON_FILE).read_bytes())['copies_across_classes'])
  except FileNotFoundError:  # a run without an audit
    return 0
  except (OSError, ValueError, KeyError, TypeError):  # edited by hand: the advice does without
    return 0
