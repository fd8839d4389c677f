"""Numbers of the studies in README and docs, from the recorded runs by NumPy and SciPy alone."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).parents[1]
README = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
DIGITS, FOLDS = 3 / 7, 1 / 4  # n_test / n_rest: a test part of 30 %, and one of five folds


def runs_of(study, variant, method, **axes):
  """{unit: record} of the finished runs of a variant, in the order of their units."""
  asked = {'variant': variant, 'method': method, 'split': 'grouped'} | axes
  lines = (ROOT / f'results/{study}/results.jsonl').read_text().splitlines()
  records = [record for record in map(json.loads, lines) if record['status'] == 'done']
  found = {
    (at['repeat'], at['fold'], at['seed']): record
    for record in records
    if asked.items() <= (at := record['axes']).items()
  }
  return dict(sorted(found.items()))


def f1_by_class(record):
  """From the confusion matrix, rows are true classes; a class that nothing is called has 0."""
  matrix = np.array(record['result']['confusion_matrix'], float)
  return 2 * np.diag(matrix) / (matrix.sum(0) + matrix.sum(1))


def macro_f1(record):
  return f1_by_class(record).mean()


def f1_of_the_rarest(record):
  return f1_by_class(record)[record['result']['class_names'].index('Physical-Damage')]


def interval(values, ratio):
  """(mean, low, high) of the corrected resampled t (Nadeau and Bengio 2003), 95 %."""
  n, mean = len(values), np.mean(values)
  half = scipy.stats.t.ppf(0.975, n - 1) * math.sqrt((1 / n + ratio) * np.var(values, ddof=1))
  return mean, mean - half, mean + half


def level(runs, metric, ratio=FOLDS):
  """'0.58 (0.51 to 0.66)' as numbers."""
  return interval([metric(record) for record in runs.values()], ratio)


def difference(study, pair, metric, ratio, **axes):
  """(mean, low, high, mean of the treatment, mean of the control), paired by unit."""
  treated, control = (runs_of(study, variant, **axes) for variant in pair)
  assert treated.keys() == control.keys()
  a, b = (np.array([metric(r) for r in side.values()]) for side in (treated, control))
  return *interval(a - b, ratio), a.mean(), b.mean()


def in_readme(*snippets):
  for snippet in snippets:
    assert snippet in README, f'the README should say: {snippet}'


def test_photos_from_scratch_and_from_pretrained_weights():
  scratch = runs_of('solar', 'none', 'cross_entropy', imbalance_factor=1.0)
  naive = runs_of('solar', 'none', 'cross_entropy', imbalance_factor=1.0, split='naive')
  frozen = runs_of('solar_pretrained', 'none', 'frozen')
  assert (len(scratch), len(naive), len(frozen)) == (10, 5, 5)
  mean, low, high = level(scratch, macro_f1)
  in_readme(f'Macro-F1 is {mean:.2f} (95 % interval {low:.2f} to {high:.2f})')
  mean, low, high = level(scratch, f1_of_the_rarest)
  in_readme(f'F1 of the rarest class {mean:.2f} ({low:.2f} to {high:.2f})')
  texts = [
    '{:.2f} ({:.2f} to {:.2f})'.format(*level(frozen, metric))
    for metric in (macro_f1, f1_of_the_rarest)
  ]
  in_readme(f'they are {texts[0]} and {texts[1]} in five runs')
  leaky = runs_of('solar_pretrained', 'none', 'frozen', split='naive')
  assert len(leaky) == 5
  first, second = (
    '{:.2f} ({:.2f} to {:.2f})'.format(*level(runs, macro_f1)) for runs in (naive, leaky)
  )
  in_readme(
    f'sides](docs/photos.md#train), macro-F1 is {first} from scratch and {second} from these.'
  )


def test_the_panels_from_pretrained_weights():
  """The first table in docs/pretrained.md, and what copies on both sides are worth."""
  page = ' '.join((ROOT / 'docs/pretrained.md').read_text(encoding='utf-8').split())

  def accuracy(record):
    return record['result']['accuracy']

  metrics = (macro_f1, f1_of_the_rarest, accuracy)
  rows = [
    ('none', 'frozen', 'grouped'),
    ('none', 'balanced_softmax', 'grouped'),
    ('csba', 'frozen', 'grouped'),
    ('csba', 'balanced_softmax', 'grouped'),
    ('none', 'frozen_cross_entropy', 'grouped'),
    ('none', 'cross_entropy', 'grouped'),
    ('csba', 'frozen_cross_entropy', 'grouped'),
    ('csba', 'cross_entropy', 'grouped'),
    ('none', 'frozen', 'naive'),
    ('none', 'balanced_softmax', 'naive'),
  ]
  found = [runs_of('solar', 'none', 'cross_entropy', imbalance_factor=1.0)]
  found += [runs_of('solar_pretrained', *row[:2], split=row[2]) for row in rows]
  position = 0
  for runs in found:
    cells = ['{:.3f} ({:.3f} to {:.3f})'.format(*level(runs, metric)) for metric in metrics]
    position = page.index(f'| {" | ".join(cells)} |', position)  # in this order
  for method in ('balanced_softmax', 'frozen', 'cross_entropy', 'frozen_cross_entropy'):
    mean, low, high, *_ = difference(
      'solar_pretrained', ('csba', 'none'), macro_f1, FOLDS, method=method
    )
    assert f'{mean:+.3f} ({low:+.3f} to {high:+.3f})' in page
  for method, signs in (('balanced_softmax', ''), ('frozen', '+')):
    naive, grouped = (
      np.array([macro_f1(r) for r in runs_of('solar_pretrained', 'none', method, split=s).values()])
      for s in ('naive', 'grouped')
    )
    a, b = ((1 / 5 + FOLDS) * side.var(ddof=1) for side in (naive, grouped))  # Welch
    mean, freedom = naive.mean() - grouped.mean(), (a + b) ** 2 / ((a * a + b * b) / 4)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    text = f'({mean - half:{signs}.3f} to {mean + half:{signs}.3f})'
    assert f'{mean:.3f}' in page
    assert text in page, text


def test_csba_on_the_digits():
  args = ('digits', ('csba', 'none'), macro_f1, DIGITS)
  mean, low, high, treated, control = difference(*args, method='cross_entropy')
  in_readme(
    f'macro-F1 {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), {treated:.3f} against '
    f'{control:.3f}'
  )
  mean, low, high, *_ = difference(*args, method='balanced_softmax')
  in_readme(f'with a loss that corrects for class sizes {mean:+.3f} ({low:+.3f} to {high:+.3f})')
  wide = runs_of('digits', 'none_wide', 'cross_entropy')
  in_readme(f'As many parameters without attention: {level(wide, macro_f1)[0]:.3f}. Every interval')


def test_other_attention_on_the_digits():
  """In docs/study.md."""
  for variant, words in (('se', '{} with cross-entropy and {} with'), ('cbam', '{} and {}.')):
    found = [
      '{:+.3f} ({:+.3f} to {:+.3f})'.format(
        *difference('digits', (variant, 'none'), macro_f1, DIGITS, method=method)[:3]
      )
      for method in ('cross_entropy', 'balanced_softmax')
    ]
    assert f'`{variant}` {words.format(*found)}' in study_page()


def test_csba_on_the_panels():
  axes = {'method': 'cross_entropy', 'imbalance_factor': 1.0}
  mean, low, high, treated, control = difference(
    'solar', ('csba', 'none'), f1_of_the_rarest, FOLDS, **axes
  )
  wide = level(runs_of('solar', 'none_wide', **axes), f1_of_the_rarest)[0]
  in_readme(
    f'F1 of the rarest class {mean:+.3f} ({low:+.3f} to {high:+.3f}) at 3:1, {treated:.3f} against '
    f'{control:.3f}; as many parameters without attention: {wide:.3f}.'
  )


def test_no_interval_of_the_differences_in_conflict_leaves_out_0_on_the_digits():
  found = []
  for method in ('cross_entropy', 'balanced_softmax'):
    for at in ('1', 'loss 0.3'):
      for measure in ('head_tail_conflict', 'minority_interference'):

        def conflict(record, at=at, measure=measure):
          [entry] = [e for e in record['conflict'] if (e['at'], e['part']) == (at, 'train')]
          return entry['scopes']['common'][measure]

        found.append(difference('digits', ('csba', 'none'), conflict, DIGITS, method=method))
  in_readme('Every interval of the differences in conflict contains 0, too.')
  assert all(low < 0 < high for _, low, high, *_ in found)


def test_gradient_surgery_on_the_digits():
  """The README, and the table in docs/surgery.md."""
  page = ' '.join((ROOT / 'docs/surgery.md').read_text(encoding='utf-8').split())
  losses = ('cross_entropy', 'balanced_softmax')
  names = ('plain', 'dual_projection', 'gradnorm', 'fixed', 'random')
  runs = {
    (name, loss): runs_of('surgery', 'none', f'{name}_{loss}') for name in names for loss in losses
  }
  f1 = {key: np.array([macro_f1(r) for r in found.values()]) for key, found in runs.items()}
  assert {len(values) for values in f1.values()} == {10}
  for name in names:
    title = 'plain training' if name == 'plain' else f'`{name}`'
    cells = ' | '.join(f'{f1[name, loss].mean():.3f}' for loss in losses)
    assert f'| {title} | {cells} |' in page
  for pair in (
    ('dual_projection', 'plain'),
    ('gradnorm', 'plain'),
    ('dual_projection', 'fixed'),
    ('dual_projection', 'random'),
  ):
    cells = [
      '{:+.3f} ({:+.3f} to {:+.3f})'.format(*interval(f1[pair[0], x] - f1[pair[1], x], DIGITS))
      for x in losses
    ]
    control = 'plain training' if pair[1] == 'plain' else f'`{pair[1]}`'
    assert f'| `{pair[0]}` - {control} | {" | ".join(cells)} |' in page
    if pair == ('dual_projection', 'plain'):
      in_readme(
        f'macro-F1 {cells[0]} on the digits, with a loss that corrects for class sizes {cells[1]}.'
      )
  seconds = {key: np.median([r['seconds'] for r in found.values()]) for key, found in runs.items()}
  ratios = [
    seconds[name, loss] / seconds['plain', loss]
    for name in ('dual_projection', 'gradnorm')
    for loss in losses
  ]
  assert f'A run takes {min(ratios):.1f} to {max(ratios):.1f} times as long' in page


def test_settings_of_pretrained_weights_on_validation_photos():
  """The table in docs/pretrained.md."""
  page = ' '.join((ROOT / 'docs/pretrained.md').read_text(encoding='utf-8').split())
  scores = {}
  for method in ('frozen_low', 'frozen_high', 'fine_tuned_equal', 'fine_tuned_third'):
    runs = runs_of('pretrained_tuning', 'none', method)
    assert len(runs) == 5
    scores[method] = np.array([r['result']['validation_macro_f1'] for r in runs.values()])
    [record, *_] = runs.values()
    train = record['config']['train']
    what = ('all', 'the classifier')[train['frozen'] == 1]
    share = '' if train['frozen'] == 1 else f' {train["pretrained_rate"]:g}'
    low, mean, high = (f(scores[method]) for f in (np.min, np.mean, np.max))
    row = f'| {what} | {train["learning_rate"]:g} |{share} | {mean:.3f} ({low:.3f} to {high:.3f}) |'
    assert row in page, row
  pairs = [a - b for a, b in itertools.permutations(scores.values(), 2)]
  largest = max(pairs, key=np.mean)
  error = largest.std(ddof=1) / math.sqrt(5)
  assert f'is {largest.mean():.3f}, and its standard error over folds is {error:.3f}:' in page


def negative_cosines(record):
  """Of each class the mean over the others of max(0, -cos): tested net, training images.

  Grams are estimates: a squared norm that is not above 0 has no cosines, which are left out, and
  cosines beyond -1 or 1 are cut.
  """
  [entry] = [e for e in record['conflict'] if (e['at'], e['part']) == ('tested', 'train')]
  packed, classes = entry['grams']['common'], len(entry['counts'])
  gram = np.zeros((classes, classes))
  gram[np.triu_indices(classes)] = packed
  gram = gram + np.triu(gram, 1).T
  norms = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), np.nan))
  negative = np.clip(-gram / np.outer(norms, norms), 0, 1)
  np.fill_diagonal(negative, np.nan)
  known = ~np.isnan(negative)
  with np.errstate(invalid='ignore'):
    return np.where(known, negative, 0).sum(1) / known.sum(1)


def spearman(x, y):
  """Along axis 1; NaN where either is constant."""
  a, b = (scipy.stats.rankdata(z, axis=1) for z in (x, y))
  a, b = (z - z.mean(1, keepdims=True) for z in (a, b))
  with np.errstate(invalid='ignore'):
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def correlation(study, ratio, **axes):
  """(r, low, high): Spearman within class over units, mean over classes, every bootstrap sample."""
  treated, control = (runs_of(study, variant, **axes) for variant in ('csba', 'none'))
  units = list(treated)
  assert list(control) == units
  less = np.array([negative_cosines(control[u]) - negative_cosines(treated[u]) for u in units])
  gain = np.array([f1_by_class(treated[u]) - f1_by_class(control[u]) for u in units])
  used = ~np.isnan(less).any(0) & (np.ptp(less, axis=0) > 0) & (np.ptp(gain, axis=0) > 0)
  less, gain = less[:, used], gain[:, used]
  value = spearman(less.T, gain.T).mean()
  n = len(units)
  samples = np.array(list(itertools.combinations_with_replacement(range(n), n)))
  times = np.array([np.bincount(sample, minlength=n) for sample in samples])
  chances = scipy.stats.multinomial.pmf(times, n, np.full(n, 1 / n))
  by_class = np.stack(
    [spearman(x[samples], y[samples]) for x, y in zip(less.T, gain.T, strict=True)]
  )
  known = ~np.isnan(by_class).all(0)
  z = np.arctanh(np.clip(np.nanmean(by_class[:, known], axis=0), -0.999, 0.999))
  chances = chances[known] / chances[known].sum()
  spread = math.sqrt(chances @ (z - chances @ z) ** 2 * (1 + n * ratio))
  half = scipy.stats.t.ppf(0.975, n - 1) * spread
  return value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)


@pytest.mark.seconds
def test_less_conflict_against_more_f1():
  cross_entropy, corrected = (
    '{:+.2f} ({:+.2f} to {:+.2f})'.format(*correlation('digits', DIGITS, method=method))
    for method in ('cross_entropy', 'balanced_softmax')
  )
  mild, strong = (
    '{:+.2f} ({:+.2f} to {:+.2f})'.format(
      *correlation('solar', FOLDS, method='cross_entropy', imbalance_factor=factor)
    )
    for factor in (1.0, 20.0)
  )
  in_readme(
    f'correlate by {cross_entropy} on digits with cross-entropy, by {corrected} with the other',
    f'and by {mild} and {strong} on the panels (3:1 and 20:1)',
  )


def study_page():
  return ' '.join((ROOT / 'docs/study.md').read_text(encoding='utf-8').split())


def test_the_length_of_a_run_of_cifar10_in_small():
  """By validation scores of `none`, in docs/study.md."""
  page = study_page()
  for epochs in (20, 40, 80):
    runs = runs_of('cifar10_small_epochs', 'none', f'epochs_{epochs}')
    scores = [r['result']['validation_macro_f1'] for r in runs.values()]
    assert len(scores) == 3
    assert f'{epochs} epochs {np.mean(scores):.3f} ({np.std(scores, ddof=1):.3f}), ' in page


def test_the_rates_of_cifar10_in_small():
  """The best mean over three subsets of each variant and loss, in docs/study.md."""
  page, spreads = study_page(), []
  rates = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
  for variant in ('none', 'none_wide', 'csba', 'csba_class', 'half', 'se', 'cbam'):
    best = []
    for method in ('cross_entropy', 'balanced_softmax'):
      scores = {
        rate: [
          r['result']['validation_macro_f1']
          for r in runs_of('cifar10_small_tuning', variant, method, learning_rate=rate).values()
        ]
        for rate in rates
      }
      assert {len(values) for values in scores.values()} == {3}
      spreads += [np.std(values, ddof=1) for values in scores.values()]
      best.append(max(rates, key=lambda rate: np.mean(scores[rate])))
    assert f'`{variant}` {best[0]:g} and {best[1]:g}' in page
  assert f"the standard deviation of the three subsets' scores is {np.mean(spreads):.2f}" in page


def of_subsets(values):
  """(mean, low, high, p): exact bootstrap-t over all samples of units, and all sign flips.

  Efron and Tibshirani 1993, ch. 12.5; the units share no image.
  """
  n, mean = len(values), values.mean()
  picks = np.array(list(itertools.combinations_with_replacement(range(n), n)))
  counts = np.stack([(picks == unit).sum(1) for unit in range(n)], 1)
  weights = np.array([math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts])
  samples = values[picks]
  with np.errstate(divide='ignore'):
    t = (samples.mean(1) - mean) / (samples.std(1, ddof=1) / math.sqrt(n))
  order = np.argsort(t)
  tail = np.cumsum(weights[order]) / n**n
  lowest = t[order][np.searchsorted(tail, 0.025)]
  highest = t[order][np.searchsorted(tail, 0.975)]
  scale = values.std(ddof=1) / math.sqrt(n)
  signs = np.array(list(itertools.product((-1, 1), repeat=n)))
  p = np.mean(np.abs(signs @ values) >= np.abs(values.sum()) - 1e-12)
  return mean, mean - scale * highest, mean - scale * lowest, p


def test_csba_on_cifar10_in_small():
  """The README, and the table in docs/study.md."""
  page = study_page()
  losses = ('cross_entropy', 'balanced_softmax')
  f1 = {
    (variant, loss): np.array(
      [macro_f1(r) for r in runs_of('cifar10_small', variant, loss).values()]
    )
    for variant in ('none', 'none_wide', 'csba')
    for loss in losses
  }
  assert {len(values) for values in f1.values()} == {10}
  for variant in ('none', 'none_wide', 'csba'):
    cells = ' | '.join(f'{f1[variant, loss].mean():.3f}' for loss in losses)
    assert f'| `{variant}` | {cells} |' in page
  for treatment, control in (('csba', 'none'), ('csba', 'none_wide'), ('none_wide', 'none')):
    found = [of_subsets(f1[treatment, loss] - f1[control, loss]) for loss in losses]
    cells = ' | '.join('{:+.3f} ({:+.3f} to {:+.3f}), p {:.3f}'.format(*one) for one in found)
    assert f'| `{treatment}` - `{control}` | {cells} |' in page
    if (treatment, control) == ('csba', 'none'):
      first, second = ('{:+.3f} ({:+.3f} to {:+.3f})'.format(*one[:3]) for one in found)
      means = ' against '.join(f'{f1[v, "cross_entropy"].mean():.3f}' for v in ('csba', 'none'))
      in_readme(f'does not help**: macro-F1 {first}, {means}; with the other loss {second}.')
