"""Which images, and which statistics of BatchNorm, csba-diagnose takes: its flags for that."""

from typing import Any

from absl import flags

from csba_jax.bin import _main

_EXACT = flags.DEFINE_bool(
  'exact', None, 'Take every training image, however long it takes; --noexact: a sample.'
)
_TARGET = flags.DEFINE_enum(
  'target', 'train', ['train', 'population'], 'Intervals for the training set, or its population.'
)
_IMAGES = flags.DEFINE_integer('images', 64, 'Images of each class in the sample.')
_FOLDS = flags.DEFINE_integer('folds', 8, 'Parts of the sample, for the intervals.')
_STATISTICS = flags.DEFINE_enum(
  'statistics',
  'auto',
  ['auto', 'batch', 'frozen'],
  'Of BatchNorm: of each batch, as in training, or running ones (frozen), as evaluated.',
)
_BATCHES = flags.DEFINE_integer('batches', 64, 'With --statistics=batch: how many batches.')
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Seed of the images or batches that are drawn.', lower_bound=0
)
_OF_SAMPLE = (_TARGET, _IMAGES, _FOLDS)  # only a sample of images reads them
_OF_IMAGES = (_EXACT, *_OF_SAMPLE)  # only frozen statistics read them
FLAGS = (_STATISTICS, *_OF_IMAGES, _BATCHES, _SEED)


def statistics() -> str:
  """auto, batch or frozen, as asked for by name or by a flag that only `frozen` reads."""
  if _STATISTICS.value == 'auto' and any(flag.present for flag in _OF_IMAGES):
    return 'frozen'
  return _STATISTICS.value


def check(chosen: str = '') -> None:
  """Refuses flags that nothing reads with the statistics that are chosen, or asked for."""
  kind = chosen or statistics()
  unread = {'batch': _OF_IMAGES, 'frozen': [_BATCHES]}.get(kind, [])
  _main.without(unread, f'--statistics={kind}')
  if _EXACT.value:
    _main.without(_OF_SAMPLE, '--exact')


def of_images() -> dict[str, Any]:
  """The fields of a `Sampling`: `exact` is None where nothing was asked for."""
  exact = _EXACT.value
  if exact is None and any(flag.present for flag in _OF_SAMPLE):
    exact = False
  return {'exact': exact} | {flag.name: flag.value for flag in (*_OF_SAMPLE, _SEED)}


def of_batches() -> dict[str, int]:
  """The fields of `Batches`."""
  return {'number': _BATCHES.value, 'seed': _SEED.value}
