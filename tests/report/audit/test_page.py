"""The page and the lines of an audit."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from csba_jax.data.audit import ODD, TINY, Audit
from csba_jax.report.audit import content, page


@pytest.fixture
def audit(tmp_path):
  """Made up: three classes, names that are no names, a set of five copies, one across classes."""
  names = ('a/0.png', 'a/1.png', 'a/2.png', 'a/3.png', 'a/4.png', 'b/0.png', 'b/x.png', 'c/0.png')
  for i, name in enumerate(names):
    path = tmp_path / 'p<i>' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 40, 3), 30 * i, np.uint8)).save(path)
  sizes = np.full((8, 2), 40)
  sizes[6] = 0
  return Audit(
    folder=str(tmp_path / 'p<i>'),
    paths=tuple(tmp_path / 'p<i>' / name for name in names),
    names=names,
    labels=np.asarray([0, 0, 0, 0, 0, 1, 1, 2], np.int32),
    class_names=('a', '<script>alert(1)</script>', 'c\nd'),
    left_out='left out of p<i>: a: 2 .heic',
    unreadable=(('b/x.png', 'empty file'),),
    sizes=sizes,
    formats={'PNG': 7},
    odd={TINY: names[:6]},
    identical=(('a/0.png', 'a/1.png'),),
    copies=(('a/0.png', 'a/1.png', 'a/2.png', 'a/3.png', 'a/4.png', 'b/0.png'),),
  )


def test_the_lines(audit):
  lines = content.describe(audit).splitlines()
  assert lines[0] == 'p<i>: 7 photos of 3 classes'
  rows = [line.split() for line in lines[2:6]]
  assert rows[1:] == [
    ['a', '5', '4'],
    ['<script>alert(1)</script>', '1', '0'],
    ['c', 'd', '1', '0'],
  ]
  text = '\n'.join(lines[6:])
  for sentence in (
    'Imbalance factor 5: a has 5 photos, <script>alert(1)</script> 1.',
    'Fewer than 20 photos, copies counted once: a (1), <script>alert(1)</script> (1), c d (1). ',
    'Shorter side: 40 to 40 pixels, median 40. Formats: PNG 7.',
    f'Small: 6 files. {ODD[TINY]}',
    'left out of p<i>: a: 2 .heic',
    'Files that cannot be read, and are left out: 1.',
    'Copies: 6 photos in 1 set, 5 more than one of each set; 1 of these are byte-identical, ',
    'Sets of copies in different classes: 1. Check their labels.',
    '  a/0.png = a/1.png = a/2.png = a/3.png = a/4.png = b/0.png',
    '  unreadable: b/x.png (empty file)',
  ):
    assert sentence in text


def test_without_copies_and_with_an_empty_class(audit):
  empty = dataclasses.replace(audit, sizes=np.zeros((8, 2), int), identical=(), copies=())
  empty.sizes[:5] = 40
  lines = content.describe(empty)
  assert 'Imbalance factor infinite' in lines
  assert 'No photo is a copy of another one.' in lines
  assert [s.anchor for s in content.sections(empty)] == ['classes', 'files']


def test_the_page_runs_nothing_and_shows_one_of_each_class_first(audit):
  drawn = page.render(audit)
  assert '<script' not in drawn
  assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in drawn
  labels = drawn[drawn.index('<section id="labels">') :]
  shown = re.findall('<figcaption>(.*?)</figcaption>', labels)
  assert shown == ['a/0.png', 'b/0.png', 'a/1.png', 'a/2.png']
  assert 'And a/3.png, a/4.png.' in labels
  assert drawn.count('src="data:image/jpeg;base64,') == 4
  assert 'http' not in drawn.replace('http-equiv', '')


def test_a_photo_that_is_gone_has_no_picture(audit, tmp_path):
  (tmp_path / 'p<i>' / 'b/0.png').unlink()
  drawn = page.render(audit)
  assert drawn.count('src="data:image/jpeg;base64,') == 3
  assert 'No longer readable: b/0.png.' in drawn


def test_copies_in_two_parts_have_a_place_of_their_own(audit):
  parts = dataclasses.replace(
    audit,
    part_of=('train',) * 4 + ('test',) * 4,
    copies=(('a/0.png', 'a/1.png'), ('a/3.png', 'a/4.png')),
  )
  lines = content.describe(parts).splitlines()
  assert 'Photos in the parts that the folder gives: train 4, test 3.' in lines
  assert any(line.startswith('Sets of copies in different parts: 1. ') for line in lines)
  drawn = page.render(parts)
  place = drawn[drawn.index('<section id="parts">') : drawn.index('<section id="copies">')]
  assert re.findall('<figcaption>(.*?)</figcaption>', place) == ['a/3.png', 'a/4.png']


def test_a_large_set_is_to_be_looked_at(audit, monkeypatch):
  assert 'largest set' not in content.describe(audit)
  monkeypatch.setattr(content, 'LARGE', 6)
  assert 'The largest set has 6 photos. Look at it: ' in content.describe(audit)


def test_the_flags_can_be_pasted_into_a_shell(tmp_path):
  flags = shlex.split(content.use_of_copies(tmp_path / 'my runs'))
  manifest = f'--config.data.manifest={tmp_path}/my runs/copies.csv'
  assert flags == [manifest, '--config.data.group_column=group']


def test_of_many_sets_the_first_are_shown(audit, monkeypatch):
  monkeypatch.setattr(content, 'SHOWN', 1)
  several = dataclasses.replace(audit, copies=(('a/0.png', 'a/1.png'), ('a/2.png', 'a/3.png')))
  drawn = page.render(several)
  assert drawn.count('src="data:image/jpeg;base64,') == 2
  assert 'The first 1 of 2 sets; audit.json lists all.' in drawn
  assert 'a/2.png' in drawn  # those that only look the same come first


def test_of_many_names_some_are_listed(audit, monkeypatch):
  monkeypatch.setattr(content, 'NAMED', 2)
  lines = content.describe(audit)
  assert '  a/0.png = a/1.png and 4 more' in lines
