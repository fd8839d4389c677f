"""The evidence of a run, gathered from its folder and its validation images."""

import json
from pathlib import Path

import ml_collections

from csba_jax.analysis.advice.evidence import Evidence
from csba_jax.data.audit import JSON_FILE
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import evaluate
from csba_jax.methods import losses
from csba_jax.run import restore


def evidence_of(run: restore.Run, conflict: Conflict | None) -> Evidence:
  """What a run tells about its problems.

  Predictions are those of the checkpoint that the run was loaded with, on its validation images.
  The test images are not looked at: what is chosen by them is not tested any more.

  Args:
    run: see `restore.load_run`.
    conflict: of its training images; None if it was not measured.
  """
  metadata, part = run.net.metadata, run.data.val
  batch = run.config.train.batch_size
  return Evidence(
    class_names=metadata.class_names,
    class_counts=metadata.class_counts,
    validation=evaluate.validate(run.net, part, batch) if len(part) else None,
    corrects=corrects_class_sizes(run.config),
    post_hoc_tau=run.net.post_hoc_tau,
    conflict=conflict,
    contradictions=_contradictions(run.workdir),
  )


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
