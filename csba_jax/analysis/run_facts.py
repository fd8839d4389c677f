"""The facts of one run: from its files, and from its test images where they are at hand."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from csba_jax.analysis import rates
from csba_jax.analysis.advice import of_run, rules
from csba_jax.analysis.rates import Rates
from csba_jax.data.audit import JSON_FILE
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import calibration, evaluate
from csba_jax.measure.calibration import Calibration, Validation
from csba_jax.run import net as net_lib
from csba_jax.run import restore
from csba_jax.run.net import Metadata
from csba_jax.run.workdir import read_result

WORST = 24  # mistakes that are shown


class Mistake(NamedTuple):
  """A test image whose class the net got wrong."""

  name: str
  image: np.ndarray  # uint8 [H, W, channels], as the net sees it
  label: int
  predicted: int
  probability: float  # of the predicted class, calibrated


@dataclasses.dataclass(frozen=True, eq=False)
class RunFacts:
  """A finished run.

  Attributes:
    workdir: its folder, as it was given.
    config: of the run.
    result: content of result.json.
    rates: 95 % intervals of the result.
    metadata: class names, training images of each class.
    validation: logits that the run has kept; None of a run without validation images.
    calibration: fitted on them.
    advice: what the rules found.
    conflict: the latest that was measured; None if none was.
    audit: content of audit.json; None of a run without one.
    mistakes: the surest of the test part; () before `with_mistakes`.
    no_mistakes: why there are none.
  """

  workdir: str
  config: ml_collections.ConfigDict
  result: Mapping[str, Any]
  rates: Rates
  metadata: Metadata
  validation: Validation | None
  calibration: Calibration
  advice: tuple[rules.Finding, ...]
  conflict: Conflict | None = None
  audit: Mapping[str, Any] | None = None
  mistakes: tuple[Mistake, ...] = ()
  no_mistakes: str = ''


def facts_of(workdir: str) -> RunFacts:
  """The facts that the files of a workdir hold; the data is not needed.

  Raises:
    UserError: there is no finished run.
  """
  folder, result = expanded(workdir), read_result(workdir)
  if missing := [name for name in ('confusion_matrix', 'examples') if name not in result]:
    raise UserError(
      f'a result.json with {missing[0]} in {workdir}',
      'that of an earlier version',
      'show it with csba-report --workdirs',
    )
  config = restore.config_of(workdir)
  metadata = net_lib.find(folder, config)
  validation = Validation.load(folder, len(metadata.class_names))
  conflict = latest_conflict(folder, result['checkpoint_step'])
  evidence = of_run.evidence_from(
    metadata, config, validation, conflict, folder, result.get('post_hoc_tau') or 0.0
  )
  return RunFacts(
    workdir=workdir,
    config=config,
    result=result,
    rates=rates.intervals(np.asarray(result['confusion_matrix'])),
    metadata=metadata,
    validation=validation,
    calibration=calibration.fit(validation, len(metadata.class_names), None),
    advice=tuple(rules.advise(evidence)),
    conflict=conflict,
    audit=_audit(folder),
  )


def with_mistakes(facts: RunFacts) -> RunFacts:
  """The same with the mistakes on the test part that the net is surest of.

  Where the data has moved or changed, `no_mistakes` says so.
  """
  try:
    run = restore.load_run(facts.workdir)
    found = evaluate.validate(run.net, run.data.test, run.config.train.batch_size)
  except UserError as error:
    return dataclasses.replace(facts, no_mistakes=f'The test images cannot be read: {error}')
  probabilities = facts.calibration.probabilities(found.logits)
  predicted = probabilities.argmax(1)
  wrong = np.flatnonzero(predicted != found.labels)
  sure = probabilities[wrong, predicted[wrong]]
  names = _test_names(run)
  mistakes = [
    Mistake(
      names[i],
      np.asarray(run.data.test.images[i]),
      int(found.labels[i]),
      int(predicted[i]),
      float(probabilities[i, predicted[i]]),
    )
    for i in wrong[np.argsort(-sure, kind='stable')][:WORST]
  ]
  return dataclasses.replace(facts, mistakes=tuple(mistakes))


def latest_conflict(folder: Path, tested: int) -> Conflict | None:
  """The conflict of training images in all layers, at best of the tested step; the last such one.

  What csba-diagnose was asked for comes before the measurements of the run itself. A file that is
  damaged is passed over.

  Args:
    folder: of the run.
    tested: step of the checkpoint that is tested.
  """
  found = []
  for path in (folder / 'conflict').glob('*.npz'):
    try:
      conflict = Conflict.load(path)
    except UserError:
      continue
    about = conflict.about
    of_training = str(about.get('target', '')).startswith(('train', 'population'))
    if of_training and not about.get('layers'):
      asked = path.name.startswith('step') and not path.name.endswith('_probe.npz')
      order = (asked, about.get('step') == tested, path.stat().st_mtime_ns, path.name)
      found.append((order, conflict))
  return max(found, key=lambda one: one[0])[1] if found else None


def _test_names(run: restore.Run) -> list[str]:
  """Names of the test images, in order; those of a separate test set stand after the others."""
  names, split = run.data.names, run.data.splits
  before = len(names) - len(split.test) if split.test_is_separate else 0
  return [names[before + i] for i in split.test]


def _audit(folder: Path) -> Mapping[str, Any] | None:
  try:
    found = json.loads((folder / JSON_FILE).read_bytes())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None
