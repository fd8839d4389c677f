"""Pictures: what is drawn, read back from the figure before it becomes a PNG."""

import dataclasses
import itertools

import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients import drawing, flow, plots
from csba_jax.gradients.conflict import Conflict, conflict_matrix
from csba_jax.gradients.gram import ClassGrams

COUNTS = np.array([40, 500, 8])


def make(classes=3, counts=COUNTS, layers=2, step=3, seed=0):
  rng = np.random.default_rng(seed)
  grams = {}
  for i in range(layers):
    g = rng.normal(size=(classes, 6))
    grams[f'layer{i}'] = g @ g.T
  found = ClassGrams(
    grams, sum(grams.values()), sum(grams.values()), np.full(classes, 4), np.ones(classes)
  )
  return Conflict.of(found, [f'kind{c}' for c in range(classes)], counts, {'step': step})


@pytest.fixture
def figures(monkeypatch):
  """Every figure that is saved."""
  kept, save = [], drawing.save

  def keep(figure, path):
    kept.append(figure)
    save(figure, path)

  monkeypatch.setattr(drawing, 'save', keep)
  return kept


def is_png(path):
  return path.read_bytes().startswith(b'\x89PNG\r\n') and path.stat().st_size > 5000


def test_heat_map(figures, tmp_path):
  conflict = make()
  known = conflict.low.copy()
  known[:, 0, 1] = known[:, 1, 0] = -2.0  # this pair's interval holds 0
  high = np.where(known == -2.0, 2.0, conflict.high)
  estimated = dataclasses.replace(conflict, errors=conflict.errors + 1e-6, low=known, high=high)
  plots.heat_map(estimated, str(tmp_path / 'x.png'))
  assert is_png(tmp_path / 'x.png')
  axes = figures[0].axes[0]
  assert axes.get_title().endswith('target batch, bold: 95 % interval without 0')
  order = [1, 0, 2]
  assert [t.get_text() for t in axes.get_yticklabels()] == [
    'kind1 (500)',
    'kind0 (40)',
    'kind2 (8)',
  ]
  image = axes.get_images()[0]
  cosines = conflict.cosine()[np.ix_(order, order)]
  off = ~np.eye(3, dtype=bool)
  np.testing.assert_array_equal(np.asarray(image.get_array())[off], cosines[off])
  low, high = image.get_clim()
  assert low == -high  # colours centred on 0
  assert high == np.abs(cosines[off]).max()
  texts = {t.get_position(): t for t in axes.texts}
  assert float(texts[1, 0].get_text()) == pytest.approx(cosines[0, 1], abs=0.005)
  assert texts[1, 0].get_weight() == 'normal'
  assert texts[2, 0].get_weight() == 'bold'


def test_what_is_not_resolvable_is_grey(figures, tmp_path):
  conflict = make()
  errors = conflict.errors.copy()
  errors[:, 2, 2] = conflict.grams[:, 2, 2]  # one standard error, not two
  plots.heat_map(dataclasses.replace(conflict, errors=errors), tmp_path / 'x.png')
  shown = np.ma.filled(figures[0].axes[0].get_images()[0].get_array(), np.nan)
  assert np.isnan(shown[2]).all()
  assert np.isfinite(shown[0, 1])


def test_what_has_no_error_of_sampling_is_not_bold(figures, tmp_path):
  plots.heat_map(make(), tmp_path / 'x.png')
  assert {text.get_weight() for text in figures[0].axes[0].texts} == {'normal'}
  assert figures[0].axes[0].get_title().endswith('target batch')


def test_a_cosine_that_rounds_to_zero_has_no_sign(figures, tmp_path):
  conflict = make()
  grams = conflict.grams.copy()
  grams[:, 0, 1] = grams[:, 1, 0] = -1e-6
  plots.heat_map(dataclasses.replace(conflict, grams=grams), tmp_path / 'x.png')
  texts = {t.get_position(): t.get_text() for t in figures[0].axes[0].texts}
  assert texts[0, 1] == '.00'


def test_undefined_entries_are_grey_and_marked(figures, tmp_path):
  conflict = make()
  grams = conflict.grams.copy()
  grams[:, 2, 2] = 0
  plots.heat_map(dataclasses.replace(conflict, grams=grams), tmp_path / 'x.png')
  axes = figures[0].axes[0]
  assert np.ma.getmaskarray(axes.get_images()[0].get_array())[2].all()
  assert {t.get_text() for t in axes.texts if t.get_position()[1] == 2} == {'?', ''}
  nothing = dataclasses.replace(conflict, grams=0 * grams)
  plots.heat_map(nothing, tmp_path / 'nothing.png')
  plots.layers(nothing, tmp_path / 'layers.png')
  plots.gradient_flow(nothing, flow.flow(nothing), tmp_path / 'flow.png')


def test_many_classes_are_not_annotated(figures, tmp_path):
  plots.heat_map(make(30, np.arange(30, 0, -1)), tmp_path / 'x.png')
  assert not figures[0].axes[0].texts


def panels(figure):
  """Those with a matrix of a layer."""
  return [axes for axes in figure.axes if axes.get_title() and axes.get_images()]


def test_small_multiples(figures, tmp_path):
  conflict = make(layers=7)
  plots.layers(conflict, tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  found = panels(figures[0])
  assert [axes.get_title().splitlines()[0] for axes in found] == list(conflict.layers)
  assert len({axes.get_images()[0].get_clim() for axes in found}) == 1  # one scale for all
  names = ['kind1 (500)', 'kind0 (40)', 'kind2 (8)']
  assert [t.get_text() for t in found[0].get_yticklabels()] == names
  assert [t.get_text() for t in found[-1].get_xticklabels()] == names
  assert 'in conflict' in found[0].get_title()


def test_names_in_small_multiples_keep_their_stage(figures, tmp_path):
  conflict = make(layers=3)
  names = ('stage1/block0/attention/excite/kernel', 'stage2/block0/attention/excite/kernel', 'head')
  plots.layers(
    dataclasses.replace(conflict, scopes=('shared', 'total', *names)), tmp_path / 'x.png'
  )
  titles = [''.join(axes.get_title().splitlines()[:-1]) for axes in panels(figures[0])]
  assert titles == list(names)


def test_of_many_classes_a_few_are_named(figures, tmp_path):
  plots.layers(make(100, np.arange(100, 0, -1)), tmp_path / 'x.png')
  labels = [t.get_text() for t in panels(figures[0])[0].get_yticklabels()]
  assert (len(labels), labels[0], labels[-1]) == (5, 'kind0 (100)', 'kind99 (1)')


def test_names_that_are_no_formulas(figures, tmp_path):
  conflict = make()
  names = ('$5_$10_', 'a' * 80, r'$\frac')
  odd = dataclasses.replace(
    conflict,
    class_names=names,
    scopes=('shared', 'total', '$a', 'b$/c$'),
    about={'target': '$x_', 'step': 3},
  )
  plots.heat_map(odd, tmp_path / 'x.png')
  plots.layers(odd, tmp_path / 'layers.png')
  plots.gradient_flow(odd, flow.flow(odd), tmp_path / 'flow.png')
  shown = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
  assert shown[1] == r'\$5_\$10_ (40)'
  assert max(map(len, shown)) <= 28 + len(' (500)')


def test_what_cannot_be_drawn_is_named(tmp_path):
  conflict = make()
  gram = conflict.gram()
  grams = ClassGrams({'a': gram}, gram, gram, np.full(3, 4), np.ones(3))
  for draw in (plots.heat_map, plots.layers):
    with pytest.raises(UserError, match='found ClassGrams; to fix it: pass Conflict.of'):
      draw(grams, tmp_path / 'x.png')
    with pytest.raises(UserError, match='a Conflict; found ndarray'):
      draw(gram, tmp_path / 'x.png')
  with pytest.raises(UserError, match='the flow of this conflict; found Conflict'):
    plots.gradient_flow(conflict, conflict, tmp_path / 'x.png')
  with pytest.raises(UserError, match='found one of other scopes'):
    plots.gradient_flow(conflict, flow.flow(make(layers=3)), tmp_path / 'x.png')
  with pytest.raises(UserError, match='ends in .png, .pdf, .svg; found .*x.jpg'):
    plots.heat_map(conflict, tmp_path / 'x.jpg')
  with pytest.raises(UserError, match='a folder .* that exists'):
    plots.heat_map(conflict, tmp_path / 'none' / 'x.png')
  assert not list(tmp_path.iterdir())


def test_the_ending_says_the_format(tmp_path):
  plots.heat_map(make(), tmp_path / 'x.pdf')
  plots.heat_map(make(), tmp_path / 'x.svg')
  assert (tmp_path / 'x.pdf').read_bytes().startswith(b'%PDF')
  assert b'<svg' in (tmp_path / 'x.svg').read_bytes()


def test_matrices_that_share_a_scale_of_colours_end_at_their_largest_entry():
  nothing = np.full((2, 2), np.nan)
  small = np.array([[1, -0.01], [-0.01, 1]])
  large = np.array([[1, -0.7], [0.2, 1]])
  assert drawing.color_limit([small, nothing, large]) == 0.7  # the diagonal is not drawn
  assert drawing.color_limit([small, nothing]) == drawing.SMALLEST_LIMIT == 0.05
  assert drawing.color_limit([nothing]) == drawing.color_limit([np.ones((1, 1))]) == 1.0
  assert drawing.color_limit([]) == 1.0


def test_gradient_flow(figures, tmp_path):
  conflict = make(layers=4)
  names = ('stem', 'stage/a', 'stage/b', 'head')
  conflict = dataclasses.replace(conflict, scopes=('shared', 'total', *names))
  found = flow.flow(conflict)
  plots.gradient_flow(conflict, found, tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  grid = np.reshape(figures[0].axes, (3, 4))  # three blocks
  assert [axes.get_title(loc='left') for axes in grid[:, 0]] == ['', 'stage', '']
  labels = [[t.get_text() for t in axes.get_yticklabels()] for axes in grid[:, 0]]
  assert labels == [['stem'], ['a', 'b'], ['head']]
  order = (1, 0, 2)
  for column, values in enumerate((found.norms, found.shares, found.cosines)):
    drawn = grid[1, column].collections[0]
    expected = values[3:5][:, order].ravel()  # stage/a and stage/b
    np.testing.assert_allclose(np.asarray(drawn.get_offsets())[:, 0], expected)
    heights = np.asarray(drawn.get_offsets())[:, 1].reshape(2, 3)
    assert (heights.round() == [[0] * 3, [1] * 3]).all()
    assert (np.diff(heights) > 0).all()  # from the largest class down
  means, pulls = (line.get_xdata() for line in grid[1, 3].lines[:2])
  np.testing.assert_array_equal(means, found.norm_ratio[3:5])
  np.testing.assert_array_equal(pulls, found.pull_ratio[3:5])
  texts = [t.get_text() for legend in figures[0].legends for t in legend.get_texts()]
  assert texts[:3] == ['kind1 (500)', 'kind0 (40)', 'kind2 (8)']


def test_gradient_flow_of_many_classes_has_a_scale_of_them(figures, tmp_path):
  conflict = make(30, np.arange(30, 0, -1))
  plots.gradient_flow(conflict, flow.flow(conflict), tmp_path / 'x.png')
  labels = [t.get_text() for t in figures[0].axes[-1].get_xticklabels()]
  assert (len(labels), labels[0], labels[-1]) == (3, 'kind0 (30)', 'kind29 (1)')


def test_over_training(figures, tmp_path):
  snapshots = [make(step=step, seed=step) for step in (10, 20, 30)]
  steps, flows = flow.over_training(snapshots)
  plots.over_training(steps, flows, snapshots, tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  rates = figures[0].axes[0].lines[0]
  assert rates.get_xdata().tolist() == [10, 20, 30]
  assert rates.get_ydata().tolist() == [s.summary()['conflict_rate'] for s in snapshots]


def test_difference_over_layers_that_both_have(figures, tmp_path):
  control, treated = make(layers=2), make(layers=3, seed=1)
  treated = dataclasses.replace(treated, about=treated.about | {'attention': 'csba'})
  plots.difference(treated, control, ['layer0', 'layer1'], tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  axes = figures[0].axes[0]
  assert axes.get_title() == 'Conflict matrix, csba - ?\nlayers that both have'
  order = [1, 0, 2]
  expected = (
    conflict_matrix(treated.gram('layer0') + treated.gram('layer1')) - control.cosine('total')
  )[np.ix_(order, order)]
  off = ~np.eye(3, dtype=bool)
  drawn = np.asarray(axes.get_images()[0].get_array())
  np.testing.assert_allclose(drawn[off], expected[off], rtol=1e-12)
  np.testing.assert_array_equal(np.diagonal(drawn), 0)
  texts = {t.get_position(): t for t in axes.texts}
  assert float(texts[1, 0].get_text()) == pytest.approx(expected[0, 1], abs=0.005)
  assert {t.get_weight() for t in axes.texts} == {'normal'}


def test_difference_of_what_does_not_go_together(tmp_path):
  with pytest.raises(UserError, match='two nets for the same classes'):
    plots.difference(make(classes=3), make(4, np.ones(4, int)), ['layer0'], tmp_path / 'x.png')
  with pytest.raises(UserError, match="found 'layer2'"):
    plots.difference(make(layers=3), make(layers=2), ['layer2'], tmp_path / 'x.png')


def test_f1_by_class(figures, tmp_path):
  runs = {
    'none': {
      'class_names': 'abc',
      'class_counts': [5, 50, 20],
      'per_class': {'f1': [0.1, 0.9, 0.5]},
    },
    'csba': {
      'class_names': 'abc',
      'class_counts': [5, 50, 20],
      'per_class': {'f1': [None, 0.8, 0]},
    },
  }
  plots.class_f1(runs, tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  axes = figures[0].axes[0]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['b (50)', 'c (20)', 'a (5)']
  none, csba = axes.containers
  assert [bar.get_height() for bar in none] == [0.9, 0.5, 0.1]
  np.testing.assert_array_equal([bar.get_height() for bar in csba], [0.8, 0, np.nan])
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ['none', 'csba']


@pytest.mark.parametrize('classes', [100, pytest.param(1000, marks=pytest.mark.seconds)])
def test_f1_of_many_classes_fits_a_page(figures, tmp_path, classes):
  names = [f'class {c}' for c in range(classes)]
  run = {'class_names': names, 'class_counts': list(range(classes, 0, -1))}
  runs = {'none': run | {'per_class': {'f1': [0.5] * classes}}}
  plots.class_f1(runs, tmp_path / 'x.png')
  figure = figures[0]
  assert figure.get_size_inches()[0] == plots.WIDEST
  figure.canvas.draw()
  boxes = [t.get_window_extent() for t in figure.axes[0].get_xticklabels()]
  assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))  # no label on another


# ---- names


def confusion_of(names, matrix, train):
  return {'class_names': names, 'class_counts': train, 'confusion_matrix': matrix}


def test_confusion(figures, tmp_path):
  found = confusion_of(['a', 'b', 'c'], [[3, 1, 0], [0, 0, 0], [2, 2, 16]], [20, 5, 40])
  plots.confusion(found, tmp_path / 'x.png', 'val')
  assert is_png(tmp_path / 'x.png')
  axes = figures[0].axes[0]
  assert axes.get_title() == 'Confusion matrix, val part, 24 images'
  assert [t.get_text() for t in axes.get_yticklabels()] == ['c (20)', 'a (4)', 'b (0)']
  assert [t.get_text() for t in axes.get_xticklabels()] == ['c', 'a', 'b']
  image = axes.get_images()[0]
  assert image.get_clim() == (0, 1)
  shown = np.ma.filled(image.get_array(), np.nan)
  np.testing.assert_allclose(shown, [[0.8, 0.1, 0.1], [0, 0.75, 0.25], [np.nan] * 3], rtol=1e-12)
  texts = {t.get_position(): t.get_text() for t in axes.texts}
  assert texts == {(0, 0): '16', (1, 0): '2', (2, 0): '2', (1, 1): '3', (2, 1): '1'}


@pytest.mark.seconds
@pytest.mark.parametrize('classes', [3, 100, 260])
def test_names_of_classes_do_not_overlap(figures, tmp_path, classes):
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  names = [f'a class whose name is far too long, of kind {c}' for c in range(classes)]
  matrix = np.eye(classes, dtype=int).tolist()
  plots.confusion(confusion_of(names, matrix, [5] * classes), tmp_path / 'x.png')
  axes, renderer = figures[0].axes[0], FigureCanvasAgg(figures[0]).get_renderer()
  for labels, side in ((axes.get_yticklabels(), 'y'), (axes.get_xticklabels(), 'x')):
    assert len({label.get_text() for label in labels}) == len(labels)
    assert min(label.get_fontsize() for label in labels) >= drawing.SMALLEST_FONT
    boxes = [label.get_window_extent(renderer) for label in labels]
    if side == 'x' and classes <= 20:
      continue  # slanted: their boxes overlap, they do not
    ends = sorted((getattr(box, f'{side}0'), getattr(box, f'{side}1')) for box in boxes)
    assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(ends))


DOLLARS = ('$5_$10_', r'$\frac{$', 'a')


@pytest.mark.seconds
def test_names_with_dollars_are_no_formulas_in_any_picture(figures, tmp_path):
  conflict = dataclasses.replace(make(layers=2), class_names=DOLLARS)
  layers = tuple(layer.replace('layer', '$_$') for layer in conflict.layers)
  conflict = dataclasses.replace(conflict, scopes=(*conflict.scopes[:-2], *layers))
  snapshots = [dataclasses.replace(make(step=s), class_names=DOLLARS) for s in (1, 2)]
  steps, flows = flow.over_training(snapshots)
  results = {'$r_$': {'class_names': DOLLARS, 'class_counts': [5, 50, 20]}}
  results['$r_$']['per_class'] = {'f1': [0.1, 0.9, 0.5]}
  plots.heat_map(conflict, tmp_path / '1.png', layers[0])
  plots.difference(conflict, conflict, [layers[0]], tmp_path / '2.png')
  plots.class_f1(results, tmp_path / '3.png')
  plots.layers(conflict, tmp_path / '4.png')
  plots.gradient_flow(conflict, flow.flow(conflict), tmp_path / '5.png')
  plots.over_training(steps, flows, snapshots, tmp_path / '6.png')
  plots.confusion(confusion_of(DOLLARS, np.eye(3, dtype=int), [5, 50, 20]), tmp_path / '7.png')
  assert [is_png(tmp_path / f'{i}.png') for i in range(1, 8)] == [True] * 7
  assert figures[0].axes[0].get_yticklabels()[1].get_text() == r'\$5_\$10_ (40)'


def test_long_names_are_cut_and_stay_distinct(figures, tmp_path):
  names = tuple(f'Electrical-damage of the panel, {side}' for side in ('left', 'right', 'top'))
  plots.heat_map(dataclasses.replace(make(), class_names=names), tmp_path / 'x.png')
  labels = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
  assert len(set(labels)) == 3
  assert max(len(label) for label in labels) <= drawing.LONGEST_NAME + len(' (500)')


def test_letters_without_a_font_are_no_warning_and_other_fonts_are_tried(
  figures, tmp_path, monkeypatch
):
  from matplotlib import font_manager
  from matplotlib.text import Text

  plots.heat_map(dataclasses.replace(make(), class_names=('日本', 'b', 'c')), tmp_path / 'x.png')
  assert is_png(tmp_path / 'x.png')
  fonts = [font_manager.FontEntry(name=name) for name in ('DejaVu Sans', 'Noto Sans CJK JP')]
  monkeypatch.setattr(font_manager.fontManager, 'ttflist', fonts)
  drawing._add_letters(figures[0])
  families = {t.get_text(): t.get_fontfamily() for t in figures[0].findobj(Text)}
  assert families['日本 (40)'] == ['DejaVu Sans', 'Noto Sans CJK JP']
  assert families['b (500)'] == ['sans-serif']
