"""report.html: one sound file that needs nothing else, and runs nothing."""

import dataclasses
import html.parser
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from csba_jax.analysis import wording
from csba_jax.analysis.stats import Estimate
from csba_jax.report.html import svg
from csba_jax.report.study import page

ANCHORS = 'summary notes scores differences non-inferiority classes matrices snapshots flow'
ANCHORS = f'{ANCHORS} branches links mantel noise leak confusion making'.split()
VOID = {'meta'}


class Page(html.parser.HTMLParser):
  """Checks that tags are balanced; keeps elements, texts and attributes."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    assert len(dict(attrs)) == len(attrs)
    self.elements.append((tag, dict(attrs), tuple(self.open)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    assert 'svg' in self.open  # nothing else may close itself
    self.elements.append((tag, dict(attrs), tuple(self.open)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.texts.append(data)

  def all(self, tag):
    return [attrs for name, attrs, _ in self.elements if name == tag]


@pytest.fixture(scope='module')
def text(made_up):
  return page.render(made_up.findings())


@pytest.fixture(scope='module')
def parsed(text):
  return Page(text)


def test_every_section_in_order(parsed):
  assert [attrs['id'] for attrs in parsed.all('section')] == ANCHORS
  assert [attrs['href'] for attrs in parsed.all('a')] == [f'#{anchor}' for anchor in ANCHORS]


def test_for_phones_in_both_schemes(parsed, text):
  metas = {attrs.get('name'): attrs.get('content') for attrs in parsed.all('meta')}
  assert metas['viewport'] == 'width=device-width, initial-scale=1'
  assert metas['color-scheme'] == 'light dark'
  assert 'prefers-color-scheme: dark' in text


def test_loads_and_runs_nothing(parsed, text):
  tags = {tag for tag, _, _ in parsed.elements}
  assert not tags & {'script', 'link', 'img', 'iframe', 'object', 'embed', 'image', 'use', 'base'}
  for _, attrs, _ in parsed.elements:
    assert not {'src', 'srcset', 'xlink:href'} & set(attrs)
    assert not [name for name in attrs if name.startswith('on')]
  assert not re.search(r'https?://|url\(|@import', text)
  assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text


def test_every_figure_has_a_caption_and_a_name(parsed):
  drawn = parsed.all('svg')
  assert len(drawn) > 40
  assert all(attrs['role'] == 'img' and attrs['aria-label'] for attrs in drawn)
  figures = [i for i, (tag, _, _) in enumerate(parsed.elements) if tag == 'figure']
  captions = [i for i, (tag, _, _) in enumerate(parsed.elements) if tag == 'figcaption']
  assert len(figures) == len(captions)
  assert all(open_[-1] == 'figure' for tag, _, open_ in parsed.elements if tag == 'figcaption')
  ids = [attrs['id'] for _, attrs, _ in parsed.elements if 'id' in attrs]
  assert len(ids) == len(set(ids)) == len(ANCHORS)


def test_rows_have_as_many_cells_as_the_head(text):
  for table in re.findall('<table>.*?</table>', text, re.S):
    rows = [len(re.findall('<t[hd][ >]', row)) for row in re.findall('<tr>.*?</tr>', table, re.S)]
    assert len(set(rows)) == 1


def test_verdicts_overall_first(text):
  shown, folded = text.split('Every comparison behind these verdicts')
  found = re.findall('<p class="claim ([a-z]+)">.*?</span> ([^<]*)</p>', shown)
  assert found == [
    ('open', 'It is open whether all links hold.'),
    ('yes', 'CSBA has a higher macro-F1 than none.'),
    ('no', 'It is capacity.'),
    ('open', 'It is open.'),
    ('idle', 'It was not tested.'),
  ]
  assert '<article' not in shown
  first, second = re.findall('<article class="claim ([a-z]+)"><h3>(.*?) <span', folded)[:2]
  assert first == ('open', 'Overall: CSBA makes a better tail by less conflict')
  assert second == ('yes', 'CSBA helps')


def test_the_forest_plot_has_a_row_for_each_primary_comparison(made_up):
  made = made_up.findings(variants=('none', 'csba', 'se'))
  made = dataclasses.replace(
    made,
    comparisons=tuple(
      c if c.treatment == 'csba' else dataclasses.replace(c, verdict='') for c in made.comparisons
    ),
  )
  summary = page.render(made).partition('<section id="summary">')[2].partition('<details>')[0]
  (drawn,) = re.findall('<svg.*?</svg>', summary)
  family = [c for c in made.comparisons if c.treatment == 'csba']
  assert len(family) == 2
  for c in family:
    assert f'csba − none, {c.cell["method"].replace("_", " ")}<' in drawn
    assert f'>{wording.interval(c.difference, signed=True)}<' in drawn
  assert 'se − none' not in drawn
  # in a file of its own: the same drawing with its colours
  alone = page.forest(made)
  assert alone.startswith('<svg xmlns="http://www.w3.org/2000/svg" class="wide" role="img"')
  assert '--paper: #ffffff' in alone
  assert 'prefers-color-scheme: dark' in alone
  assert alone.endswith(drawn.partition('>')[2] + '\n')
  xml.etree.ElementTree.fromstring(alone)


def test_no_comparisons_no_forest_plot(made_up):
  assert page.forest(made_up.bare(made_up.findings())) == ''


def test_nothing_undefined_is_written(parsed, made_up):
  for made in (parsed, Page(page.render(made_up.findings(seeds=1)))):
    assert not re.search(r'\b(nan|inf)\b', ' '.join(made.texts), re.I)
    for _, attrs, _ in made.elements:
      assert not re.search(r'\b(nan|inf)\b', ' '.join(map(str, attrs.values())), re.I)


def test_one_seed_has_no_intervals_and_says_so(made_up):
  texts = ' '.join(Page(page.render(made_up.findings(seeds=1))).texts)
  assert '[–]: no interval: 1 unit.' in texts
  assert 'n = 1 unit; no intervals' in texts


def test_empty_sections_are_left_out(made_up):
  parsed = Page(page.render(made_up.bare(made_up.findings())))
  assert [attrs['id'] for attrs in parsed.all('section')] == ['scores', 'classes', 'confusion']


@pytest.mark.parametrize('variants', [('none',), ('se', 'cbam'), ('csba',), ('x', 'none', 'y')])
def test_any_choice_of_variants(made_up, variants):
  parsed = Page(page.render(made_up.findings(variants=variants, methods=('drw',))))
  assert 'matrices' in [attrs['id'] for attrs in parsed.all('section')]


def test_hostile_names_stay_text(made_up):
  text = page.render(made_up.hostile())
  parsed = Page(text)
  tags = {tag for tag, _, _ in parsed.elements}
  assert not tags & {'script', 'b', 'img'}
  assert any(made_up.HOSTILE in written for written in parsed.texts)
  assert any('"q" \'s\' &amp; (50)' in written for written in parsed.texts)
  assert '\x1b' not in text
  text.encode()  # without half characters
  assert [attrs['id'] for attrs in parsed.all('section')] == ANCHORS


def test_size(text, made_up):
  large = page.render(
    made_up.findings(methods=('cross_entropy', 'balanced_softmax', 'class_balanced', 'drw'))
  )
  assert len(text) < len(large) < 2_000_000


def test_a_hundred_classes(made_up):
  classes = [f'class {c}' for c in range(100)]
  text = page.render(
    made_up.findings(('none', 'csba'), ('cross_entropy',), classes=classes, seeds=2)
  )
  Page(text)
  assert len(text) < 2_000_000


def test_same_findings_same_bytes(text, made_up):
  assert page.render(made_up.findings()) == text


def test_configuration_is_json(text):
  code = re.findall('<pre tabindex="0"><code>(.*?)</code>', text, re.S)[-1]
  config = json.loads(html.unescape(code))
  assert config['base']['train'] == {'steps': 3000, 'rate': None}


def test_dots_are_where_their_values_are():
  series = svg.Series('s', [(0.25, 0.0, 1.0), (float('nan'),) * 3], 0)
  drawn = svg.dots(['a', 'b'], [series], title='t', axis='x', limits=(0.0, 1.0), width=474)
  left, right = 60, 460  # of the axis
  path = re.search('<path class="s0" d="([^"]*)"', drawn).group(1)
  assert path.startswith(f'M{left} 17H{right}M{left + (right - left) // 4} 17m')
  assert path.count('M') == 2  # nothing for NaN


def test_heat_map_tells_signs_and_gaps_apart():
  values = np.array([[1.0, -0.5, np.nan], [-0.5, 1.0, 0.25], [np.nan, 0.25, 1.0]])
  drawn = svg.heat_map(values, ['a', 'b', 'c'], title='t', limit=0.5)
  shades = re.findall('<path (class="[npu]"[^d]*) d="([^"]*)"', drawn)
  assert [(shade, d.count('M')) for shade, d in shades] == [
    ('class="n" fill-opacity="1.00"', 2),
    ('class="p" fill-opacity="0.50"', 2),
    ('class="u"', 2),
  ]
  assert re.findall('>([−.0-9–]+)</text>', drawn)[-6:] == ['−.50', '–', '−.50', '.25', '–', '.25']


@pytest.mark.parametrize(
  ('low', 'high', 'ticks'),
  [
    (0.0, 1.0, ['0.0', '0.2', '0.4', '0.6', '0.8', '1.0']),
    (-0.02, 0.02, ['−0.02', '−0.01', '0.00', '0.01', '0.02']),
    (0, 300, ['0', '50', '100', '150', '200', '250', '300']),
  ],
)
def test_ticks_are_round(low, high, ticks):
  drawn = svg.dots(['a'], [], title='t', axis='x', limits=(low, high))
  assert re.findall('class="m">([^<]*)<', drawn) == ticks


@pytest.mark.parametrize(
  ('values', 'ticks'),
  [
    ((0.3, 8), ['0.5', '1', '2', '5']),  # a decade and a half
    ((0.3, 60), ['1', '10']),
    ((2, 8), ['2', '3', '4', '5', '6', '7', '8']),
  ],
)
def test_logarithmic_axes_have_more_than_one_tick(values, ticks):
  series = svg.Series('s', [(x, float('nan'), float('nan')) for x in values], 0)
  drawn = svg.dots(['a', 'b'], [series], title='t', axis='x', log=True)
  assert re.findall('class="m">([^<]*)<', drawn) == ticks


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    *((0.0, '0.000'), (-0.0, '0.000'), (0.25, '+0.250'), (-1.5, '−1.500'), (-4e-4, '−0.0004')),
    *((float('nan'), '–'), (None, '–'), (float('inf'), '–'), (123456.0, '+1.23e+05')),
  ],
)
def test_number(value, expected):
  assert wording.number(value, signed=True) == expected


def test_interval_without_ends():
  one = Estimate(0.5, float('nan'), float('nan'), 0.95, 1, float('nan'), 'no interval: 1 unit')
  assert wording.interval(one) == '0.500 [–]'
  assert wording.without_interval([one, one]) == '[–]: no interval: 1 unit.'


def test_snapshots_in_order():
  snapshots = sorted(['loss 0.3', '1', '0', 'loss 1', '0.1'], key=wording.by_snapshot)
  assert [*map(wording.snapshot, snapshots)] == ['start', '10 %', 'end', 'loss ≤ 1', 'loss ≤ 0.3']
