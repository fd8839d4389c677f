"""Predictions for photos as lines, CSV or JSON lines."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from csba_jax.errors import UserError
from csba_jax.measure.calibration import LEAST, Calibration, Trust, calibration_error
from csba_jax.measure.predict import Prediction, Predictor

UNSURE = '-'  # printed where no class is predicted


def line(one: Prediction, names: Sequence[str]) -> str:
  """'0.912  cat  new/3.jpg'; of a photo that cannot be read, why."""
  if one.reason:
    return f'cannot be read: {_text(one.file)} ({one.reason})'
  name = names[one.label] if one.label >= 0 else UNSURE
  return f'{one.confidence:.3f}  {name}  {_text(one.file)}'


def explain(predictor: Predictor) -> Iterator[str]:
  """What is done to the net's output, with numbers of the validation images."""
  validation, calibration = predictor.validation, predictor.calibration
  names = predictor.net.metadata.class_names
  if validation is None or len(validation.labels) < LEAST:
    n = 0 if validation is None else len(validation.labels)
    yield f'probabilities are not calibrated: the run has kept {n} validation images'
    return
  if calibration.bias.any():
    yield f'temperature {calibration.temperature:.2f}, and other class shares'
  else:
    plain = Calibration(1.0, np.zeros(len(names)))
    before, after = (calibration_error(validation, c) for c in (plain, calibration))
    yield (
      f'temperature {calibration.temperature:.2f} from {len(validation.labels):,} validation '
      f'images: their calibration error is {after:.3f}, without it {before:.3f}'
    )
  if (predictor.weights != 1).any():
    pairs = zip(names, predictor.weights, strict=True)
    yield f'weights of classes: {", ".join(f"{n} {f:.3g}" for n, f in pairs if f != 1)}; others 1'


def trust(found: Trust | None) -> Iterator[str]:
  """What calibration and abstention give on the test part; no line where it is not known."""
  if found is None:
    return
  yield (
    f'calibration error {found.error[1]:.3f} with temperature {found.temperature:.2f} of the '
    f'validation images, {found.error[0]:.3f} without'
  )
  yield (
    f'the surest {100 * found.coverage:.0f} % of the images: accuracy {found.accuracy[1]:.3f} '
    f'(all: {found.accuracy[0]:.3f}), macro-F1 {found.macro_f1[1]:.3f} (all: '
    f'{found.macro_f1[0]:.3f})'
  )


def show(names: Sequence[str], found: Iterable[Prediction]) -> list[Prediction]:
  """Prints a line for each photo; returns those that cannot be read."""
  unreadable = []
  for one in found:
    if one.reason:
      unreadable.append(one)
    else:
      print(line(one, names), flush=True)
  return unreadable


def write(path: Path, names: Sequence[str], found: Iterable[Prediction]) -> list[Prediction]:
  """Writes a new file as a whole or not at all; returns those that cannot be read.

  Raises:
    UserError: it cannot be written.
  """
  unreadable: list[Prediction] = []

  def noted() -> Iterator[Prediction]:
    for one in found:
      if one.reason:
        unreadable.append(one)
      yield one

  handle, temporary = -1, ''
  try:
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f'.{path.name}.')
    with os.fdopen(handle, 'w', encoding='utf-8', newline='') as file:
      fill = _fill_csv if path.suffix == '.csv' else _fill_jsonl
      fill(file, names, noted())
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.link(temporary, path)  # fails if another program has made the file in the meantime
  except OSError as error:
    do = 'make room there, or set another --out'
    raise UserError(f'to write {path}', str(error), do) from error
  finally:
    if temporary and os.path.exists(temporary):
      os.unlink(temporary)
  return unreadable


def _fill_csv(file: TextIO, names: Sequence[str], found: Iterable[Prediction]) -> None:
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(['file', 'class', 'confidence', *(f'p:{name}' for name in names), 'error'])
  for one in found:
    name = names[one.label] if one.label >= 0 else ''
    numbers = ['' if one.reason else f'{p:.6f}' for p in (one.confidence, *one.probabilities)]
    writer.writerow([_text(one.file), name, *numbers, one.reason])


def _fill_jsonl(file: TextIO, names: Sequence[str], found: Iterable[Prediction]) -> None:
  for one in found:
    record: dict[str, Any] = {'file': _text(one.file)}
    if one.reason:
      record['error'] = one.reason
    else:
      record['class'] = names[one.label] if one.label >= 0 else None
      record['confidence'] = round(one.confidence, 6)
      pairs = zip(names, one.probabilities.tolist(), strict=True)
      record['probabilities'] = {name: round(p, 6) for name, p in pairs}
    file.write(json.dumps(record, ensure_ascii=False) + '\n')


def _text(path: Path) -> str:
  r"""A path as UTF-8 can hold it, with \xNN for other bytes."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')
