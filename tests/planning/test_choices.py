"""Settings that follow from a folder of photos, on made-up audits."""

import dataclasses

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import splits
from csba_jax.data.audit import Audit
from csba_jax.errors import UserError
from csba_jax.planning import choices
from csba_jax.planning.choices import Hardware

RECIPE = config_lib.load('image_folder')


def audit_of(counts, side=256, copies=()):
  """An audit of classes with so many photos of one size."""
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  return Audit(
    folder='photos',
    paths=(),
    names=tuple(f'{c}/{i}.jpg' for i, c in enumerate(labels)),
    labels=labels,
    class_names=tuple(map(str, range(len(counts)))),
    left_out='',
    unreadable=(),
    sizes=np.full((len(labels), 2), (2 * side, side)),
    formats={'JPEG': len(labels)},
    odd={},
    identical=(),
    copies=copies,
  )


def chosen(audit, given=None, hardware=None, minutes=8.0):
  found = choices.choose(
    audit, RECIPE, given or {}, hardware or Hardware(2), minutes, '/photos', '/run/copies.csv'
  )
  assert len({choice.field for choice in found}) == len(found)
  assert all(choice.field in config_lib.flatten(RECIPE) for choice in found)
  assert all(choice.reason for choice in found)
  return {choice.field: choice.value for choice in found}


def seconds(audit, found, hardware):
  """What training takes by the rule of the docstring."""
  images = len(audit.names) * 0.8 * 0.9
  return images * found['train.epochs'] * found['data.image_size'] ** 2 / hardware.rate


@pytest.mark.parametrize('cores', [1, 2, 8, 64])
@pytest.mark.parametrize('minutes', [0.5, 8, 60])
@pytest.mark.parametrize('photos', [60, 900, 5_000, 40_000])
def test_training_fits_into_the_minutes_unless_it_would_be_too_short(cores, minutes, photos):
  audit, hardware = audit_of([photos // 2, photos // 2]), Hardware(cores)
  found = chosen(audit, hardware=hardware, minutes=minutes)
  least = found['train.epochs'] == choices.LEAST_EPOCHS and found['data.image_size'] == 32
  assert least or seconds(audit, found, hardware) <= 60.5 * minutes
  larger = [size for size in choices.SIZES if found['data.image_size'] < size <= 256]
  if larger:  # or the next size would not
    more = found | {'data.image_size': larger[0]}
    assert seconds(audit, more, hardware) > 59.5 * minutes


def test_weights_choose_their_net_and_fewer_epochs():
  audit, hardware = audit_of([450, 450]), Hardware(2)
  plain = choices.choose(audit, RECIPE, {}, hardware, 8.0, '/photos', 'c.csv')
  given = {'model.init': 'w.safetensors'}
  found = choices.choose(audit, RECIPE, given, hardware, 8.0, '/photos', 'c.csv', 'resnet18')
  values = {choice.field: choice.value for choice in found}
  assert {
    k: v
    for k, v in values.items()
    if k.startswith(('model', 'train.frozen', 'train.learn', 'train.pre'))
  } == {
    'model.name': 'resnet18',
    'model.attention': 'none',
    'model.width': 1.0,
    'train.frozen': 0.2,
    'train.learning_rate': 0.01,
  }
  assert all(choice.reason for choice in found)
  (epochs,) = (choice.value for choice in plain if choice.field == 'train.epochs')
  assert choices.FINE_TUNED.epochs <= values['train.epochs'] < epochs
  rate = hardware.rate / choices.FINE_TUNED.cost  # pixels a second
  pixels = len(audit.names) * 0.72 * values['train.epochs'] * values['data.image_size'] ** 2
  assert pixels <= 60.5 * 8 * rate
  own = given | {'train.frozen': 0.0, 'model.attention': 'csba', 'train.epochs': 3}
  found = choices.choose(audit, RECIPE, own, hardware, 8.0, '/photos', 'c.csv', 'resnet18')
  assert not {choice.field for choice in found} & own.keys()


@pytest.mark.parametrize(('side', 'size'), [(20, 32), (32, 32), (63, 48), (64, 64), (500, 224)])
def test_images_are_no_larger_than_most_photos(side, size):
  assert chosen(audit_of([50, 50], side), minutes=1e6)['data.image_size'] == size


@pytest.mark.parametrize(
  ('photos', 'batch', 'epochs'),
  [(8, 2, 100), (20, 4, 100), (900, 32, 48), (5_000, 32, 20), (9_000, 64, 20), (99_000, 128, 20)],
)
def test_batch_and_epochs(photos, batch, epochs):
  found = chosen(audit_of([photos // 2, photos // 2]), minutes=1e6)
  assert (found['train.batch_size'], found['train.epochs']) == (batch, epochs)


@pytest.mark.parametrize(('epochs', 'every'), [(1, 1), (5, 1), (6, 2), (100, 20)])
def test_five_validations_or_fewer(epochs, every):
  assert chosen(audit_of([50, 50]), {'train.epochs': epochs})['train.eval_every'] == every


def test_a_gpu_trains_on_larger_images():
  audit = audit_of([20_000, 20_000])
  small, large = (chosen(audit, hardware=Hardware(8, gpus)) for gpus in (0, 1))
  assert small['data.image_size'] < large['data.image_size']


@pytest.mark.parametrize(
  ('counts', 'loss'),
  [([100, 100], 'cross_entropy'), ([149, 100], 'cross_entropy'), ([150, 100], 'balanced_softmax')],
)
def test_the_loss_corrects_where_classes_differ(counts, loss):
  assert chosen(audit_of(counts))['loss.name'] == loss


def test_copies_become_the_manifest():
  audit = audit_of([50, 50], copies=(('0/0.jpg', '0/1.jpg'),))
  found = chosen(audit)
  assert found['data.manifest'] == '/run/copies.csv'
  assert found['data.group_column'] == 'group'
  for field in ('data.manifest', 'data.group_column'):
    assert not chosen(audit, {field: 'own'}).keys() & {'data.manifest', 'data.group_column'}
  assert 'data.manifest' not in chosen(audit_of([50, 50]))


def test_what_is_given_is_not_chosen_and_the_rest_fits_it():
  audit = audit_of([450, 450])
  given = {'data.image_size': 224, 'train.batch_size': 8, 'loss.name': 'focal'}
  found = chosen(audit, given)
  assert not found.keys() & given.keys()
  assert found['augment.crop_padding'] == 14
  assert seconds(audit, found | given, Hardware(2)) <= 60 * 8.5
  assert 'train.epochs' not in chosen(audit, {'train.epochs': 3})


def test_a_run_that_takes_longer_says_so():
  audit = audit_of([450, 450])
  given = {'data.image_size': 224}
  (epochs,) = (
    choice
    for choice in choices.choose(audit, RECIPE, given, Hardware(1), 0.1, '/photos', 'copies.csv')
    if choice.field == 'train.epochs'
  )
  assert epochs.value == choices.LEAST_EPOCHS
  assert epochs.reason == 'more would take over 0.1 minutes on 1 CPU core; expect about 2 minutes'


@pytest.mark.parametrize(
  ('parts', 'training'),
  [
    (('train',), 72),  # of 50 and 50: 10 each for the test, 4 each for validation
    (('train', 'val'), 40),
    (('train', 'test'), 44),
    (('train', 'val', 'test'), 34),
  ],
)
def test_given_parts_decide_how_many_photos_train(parts, training):
  audit = audit_of([50, 50], copies=(('0/0.jpg', '0/1.jpg'),))
  part_of = tuple(parts[i % len(parts)] for i in range(100))
  found = choices.choose(
    dataclasses.replace(audit, part_of=part_of), RECIPE, {}, Hardware(2), 8, '/p', 'copies.csv'
  )
  reasons = {choice.field: choice.reason for choice in found}
  assert reasons['train.batch_size'] == f'{training} photos to train on'
  assert 'where the folder has no part' in reasons['data.manifest']


def test_a_batch_is_no_larger_than_the_training_part():
  for classes, n in ((12, 2), (2, 4), (4, 4)):
    labels = np.repeat(np.arange(classes), n)
    found = choices.choose(audit_of([n] * classes), RECIPE, {}, Hardware(2), 8, '/p', 'c.csv')
    batch = next(c.value for c in found if c.field == 'train.batch_size')
    split = splits.make_splits(
      labels,
      class_names=tuple(map(str, range(classes))),
      imbalance_factor=1.0,
      profile='natural',
      class_order='index',
      val_fraction=0.1,
      test_fraction=0.2,
      seed=0,
    )
    assert 2 <= batch <= len(split.train)
    reason = next(c.reason for c in found if c.field == 'train.batch_size')
    assert reason == f'{len(split.train)} photos to train on'


@pytest.mark.parametrize('counts', [[2, 1], [3, 1], [1, 1]])
def test_too_few_photos(counts):
  with pytest.raises(UserError, match='at least 4 photos to train on; found [0-3]; '):
    chosen(audit_of(counts))


def test_a_class_without_a_photo_to_train_on():
  audit = audit_of([50, 50])
  part_of = ('train',) * 50 + ('test',) * 50
  with pytest.raises(UserError, match='in every class; found none that can be read of 1; '):
    chosen(dataclasses.replace(audit, part_of=part_of))


def test_the_loss_looks_at_the_training_part_alone():
  audit = audit_of([60, 30])
  part_of = ('train',) * 30 + ('test',) * 30 + ('train',) * 30
  assert chosen(audit)['loss.name'] == 'balanced_softmax'
  assert chosen(dataclasses.replace(audit, part_of=part_of))['loss.name'] == 'cross_entropy'


def test_folds_decide_how_many_photos_train():
  recipe = config_lib.load('image_folder')
  recipe.data.folds = 2
  found = choices.choose(audit_of([50, 50]), recipe, {}, Hardware(2), 8, '/photos', 'copies.csv')
  assert any(choice.reason == '44 photos to train on' for choice in found)
