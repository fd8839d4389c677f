"""What loading a folder of photos says before a run begins."""

import pytest
from PIL import Image

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.data.class_counts import profile_counts
from csba_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
  """The data section for a folder of two classes, one of a single image and one of eight."""
  for name in ('cat/0.png', *(f'dog/{i}.png' for i in range(8))):
    path = tmp_path / 'photos' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (20 * int(path.stem), 9 * (path.parent.name == 'cat'), 9)).save(path)
  found = config_lib.default()
  found.data.update(source='image_folder', dir=str(tmp_path / 'photos'), channels=3, num_classes=0)
  found.data.cache_dir = str(tmp_path / 'cache')
  found.data.profile = 'natural'
  return found


def test_what_is_left_out_and_what_parts_lack_is_said_at_every_start(config, tmp_path):
  (tmp_path / 'photos/cat/1.heic').write_bytes(b'x')
  for _ in range(2):  # decoded, then from the cache
    lines = []
    pipeline.load(config, lines.append)
    assert lines[0] == 'left out of photos: cat: 1 .heic'
    assert [line.partition(':')[0] for line in lines[-2:]] == [
      'no test image of cat',
      'no validation image of cat',
    ]


def test_nothing_is_said_of_a_validation_part_that_is_not_asked_for(config):
  config.data.val_fraction = 0.0
  lines = []
  pipeline.load(config, lines.append)
  assert not any('validation' in line for line in lines)


def test_names_of_parts_are_classes_where_the_config_says_so(config, tmp_path):
  for part in ('train', 'val'):
    (tmp_path / 'parts').mkdir(exist_ok=True)
    (tmp_path / 'parts' / part).symlink_to(tmp_path / 'photos')
  config.data.dir = str(tmp_path / 'parts')
  data = pipeline.load(config, print)
  assert 'train' not in data.class_names
  assert len(data.val) == sum(name.startswith('val/') for name in data.names) > 0
  config.data.layout, config.data.group_copies = 'classes', False
  assert pipeline.load(config, print).class_names == ('train', 'val')


def test_the_layout_of_what_is_no_folder(config):
  digits = config_lib.default()
  digits.data.layout = 'classes'
  with pytest.raises(UserError, match=r'data\.layout only with data\.source=image_folder'):
    pipeline.load(digits, print)


def test_the_largest_class_is_cut_as_the_config_says():
  digits = config_lib.default()
  digits.data.update(largest_class=50, imbalance_factor=5.0, val_fraction=0.0)
  found = pipeline.load(digits, print)
  assert found.class_counts.tolist() == profile_counts(50, 10, 5, 'exp').tolist()
  digits.data.disjoint_subsets = 2
  with pytest.raises(UserError, match='a test part of its own with data.disjoint_subsets'):
    pipeline.load(digits, print)
