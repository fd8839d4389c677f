"""The folder of an exported net."""

import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import csba_jax
from csba_jax.errors import UserError
from csba_jax.export import program, weights
from csba_jax.files import check_new_folder
from csba_jax.measure.predict import Predictor

PROGRAM, ABOUT, WEIGHTS, SCRIPT, CARD = (
  'model.jax',
  'model.json',
  'weights.safetensors',
  'predict.py',
  'README.md',
)
MODES = {1: 'L', 3: 'RGB'}  # of Pillow, by channels
PACKAGES = ('jax', 'flax')


def about(predictor: Predictor, min_confidence: float) -> dict[str, Any]:
  """The content of model.json: what a program needs beside the net to name a class.

  Calibration is part of the program already; here it is for the reader.
  """
  metadata, calibration = predictor.net.metadata, predictor.calibration
  size, _, channels = metadata.image_shape
  return {
    'format': 'csba_jax export 1',
    'class_names': list(metadata.class_names),
    'class_counts': [int(n) for n in metadata.class_counts],
    'image_size': size,
    'mode': MODES[channels],
    'class_weights': [float(weight) for weight in predictor.weights],
    'min_confidence': min_confidence,
    'temperature': float(calibration.temperature),
    'bias': [float(b) if math.isfinite(b) else None for b in calibration.bias],
    'step': predictor.net.step,
    'versions': {'csba_jax': csba_jax.__version__}
    | {name: importlib.metadata.version(name) for name in PACKAGES},
  }


def write(out: Path, predictor: Predictor, min_confidence: float, card: str) -> list[Path]:
  """Writes the folder of a predictor, as a whole or not at all; returns its files.

  Args:
    out: path of the new folder.
    predictor: what is exported.
    min_confidence: below it, no class is predicted.
    card: the text of README.md.

  Raises:
    UserError: there is such a folder, or it cannot be written.
  """
  check_new_folder('--out', out)
  told = json.dumps(about(predictor, min_confidence), indent=1, ensure_ascii=False)
  script = Path(__file__).with_name('predict_photos.py').read_text(encoding='utf-8')
  files: Mapping[str, bytes] = {
    CARD: card.encode(),
    ABOUT: f'{told}\n'.encode(),
    PROGRAM: program.program_of(predictor),
    WEIGHTS: weights.weights_of(predictor.net),
    SCRIPT: script.encode(),
  }
  try:
    _write_all(out, files)
  except OSError as error:
    raise UserError(
      f'to write {out}', f'{type(error).__name__}: {error}', 'make room, or name another --out'
    ) from error
  return [out / name for name in files]


def _write_all(out: Path, files: Mapping[str, bytes]) -> None:
  """Writes files into a folder beside `out`, which then gets its name."""
  temporary = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f'.{out.name}.'))
  try:
    for name, content in files.items():
      with (temporary / name).open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(0o755)  # mkdtemp makes folders that other users may not read
    temporary.rename(out)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
