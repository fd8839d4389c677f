"""The examples and the page for other people's models do what they say."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PNG = b'\x89PNG\r\n\x1a\n'
CLASSES = {'linen_cnn': 10, 'equinox_mlp': 5, 'token_mixer': 6}


def load(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_example_is_tested():
  assert {path.stem for path in (ROOT / 'examples').glob('*.py')} == set(CLASSES)


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=[pytest.mark.slow] if n != 'linen_cnn' else []) for n in CLASSES],
)
def test_example_trains_and_draws_its_conflict_matrix(name, tmp_path):
  if name == 'equinox_mlp':
    pytest.importorskip('equinox')
  conflict, losses = load(name).main(tmp_path / 'x.png')

  assert losses[-1] < 0.8 * losses[0]
  pictures = list(tmp_path.iterdir())
  assert tmp_path / 'x.png' in pictures
  assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
  cosines = conflict.cosine()
  assert cosines.shape == (CLASSES[name], CLASSES[name])
  np.testing.assert_array_equal(cosines, cosines.T)
  np.testing.assert_array_equal(np.diagonal(cosines), 1)
  assert (cosines < 0).any()


@pytest.mark.slow
def test_blocks_of_own_model_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  page = (ROOT / 'docs' / 'own_model.md').read_text()
  blocks = list(re.finditer(r'^```python\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))
  assert len(blocks) >= 8
  names = {}
  for block in blocks:
    first_line = page[: block.start(1)].count('\n')
    exec(compile('\n' * first_line + block[1], 'docs/own_model.md', 'exec'), names)

  assert Path('conflict.png').read_bytes().startswith(PNG)
  # what the page says of this run
  said = capsys.readouterr().out
  assert names['conflict'].summary()['conflict_rate'] == pytest.approx(0.62, abs=0.03)
  assert [float(x) for x in re.findall(r'^\[\d, \d, \d\] (\S+)$', said, re.MULTILINE)] == (
    pytest.approx([0.89, 0.54], abs=0.05)
  )
  exact, sample = names['exact'].cosine(), names['of_sample']
  at = sample.at('shared')
  inside = (sample.low[at] <= exact) & (exact <= sample.high[at])
  assert inside[np.triu_indices(10, 1)].sum() == pytest.approx(44, abs=2)


def test_links_of_own_model_lead_somewhere():
  page = ROOT / 'docs' / 'own_model.md'
  links = re.findall(r'\]\(([^)]+)\)', page.read_text())
  assert len(links) >= len(CLASSES)
  assert all((page.parent / link).is_file() for link in links)
