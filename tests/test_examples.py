"""The examples run as they are and do what they say."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PNG = b'\x89PNG\r\n\x1a\n'
CLASSES = {'linen_cnn': 10, 'equinox_mlp': 5, 'token_mixer': 6}
PICTURES = {'linen_cnn': 1, 'equinox_mlp': 2, 'token_mixer': 2}


def test_every_example_is_tested():
  assert {path.stem for path in (ROOT / 'examples').glob('*.py')} == set(CLASSES)


@pytest.mark.parametrize('name', CLASSES)
def test_example_has_a_page_in_the_gallery(name):
  """A title, and the pictures that it draws: they are kept, since the site runs no example."""
  lines = (ROOT / 'examples' / f'{name}.py').read_text().splitlines()
  assert lines[0] == '"""'
  assert lines[2] == '=' * len(lines[1])
  assert lines[-1] == f"# sphinx_gallery_thumbnail_path = '_static/examples/{name}.png'"
  drawn = {found[1] for line in lines if (found := re.search(r", '(\w+\.png)'\)", line))}
  kept = {f'{path.stem}.png' for path in (ROOT / 'docs/_static/examples').glob('*.png')}
  assert len(drawn) == PICTURES[name]
  assert drawn <= kept
  assert all(f'# .. image:: /_static/examples/{picture}' in lines for picture in drawn)


@pytest.mark.seconds
@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=[pytest.mark.slow] if n != 'linen_cnn' else []) for n in CLASSES],
)
def test_example_trains_and_draws_its_conflict_matrix(name, tmp_path, monkeypatch):
  if name == 'equinox_mlp':
    pytest.importorskip('equinox')
  monkeypatch.chdir(tmp_path)
  found = runpy.run_path(str(ROOT / 'examples' / f'{name}.py'), run_name='__main__')
  conflict, losses = found['conflict'], found['losses']

  assert losses[-1] < 0.8 * losses[0]
  pictures = list(tmp_path.iterdir())
  assert tmp_path / f'{name}.png' in pictures
  assert len(pictures) == PICTURES[name]
  assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
  cosines = conflict.cosine()
  assert cosines.shape == (CLASSES[name], CLASSES[name])
  np.testing.assert_array_equal(cosines, cosines.T)
  np.testing.assert_array_equal(np.diagonal(cosines), 1)
  assert (cosines < 0).any()
