"""Findings of runs that never were: plausible numbers, everything filled in."""

import dataclasses
import math

import numpy as np

from csba_jax.analysis import findings as findings_lib
from csba_jax.analysis import types as lib
from csba_jax.analysis.stats import Estimate
from csba_jax.gradients.conflict import majority_minority

VARIANTS = ('none', 'none_wide', 'se', 'cbam', 'csba', 'csba_class')
CLASSES = (
  *('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship'),
  'Physical-Damage',
)
HOSTILE = '<script>alert(1)</script>|x'
SNAPSHOTS = ('0', '0.1', '0.5', '1', 'loss 1', 'loss 0.3')
PARTS = ('train', 'val')
SCOPES = ('common', 'shared', 'stem', 'stage1', 'stage2', 'stage3', 'branch1x1', 'branch3x3')
NAN = math.nan


def findings(
  variants=VARIANTS,
  methods=('cross_entropy', 'balanced_softmax'),
  classes=CLASSES,
  seeds=5,
  rng=0,
):
  """A study of these variants and methods; one seed has no intervals."""
  make = _Maker(variants, methods, classes, seeds, np.random.default_rng(rng))
  return findings_lib.Findings(
    name='cifar10_lt',
    outcome='macro-F1',
    class_names=tuple(classes),
    class_counts=make.counts,
    groups=tuple(np.array(majority_minority(counts), float) for counts in make.counts),
    variants=tuple(variants),
    cells=make.cells,
    about=make.about(),
    notes=(
      'line 17 of results.jsonl is torn: left out',
      'run csba-cross_entropy-s3 failed: OutOfMemory: 12 GiB asked for',
    ),
    claims=make.claims(),
    scores=make.scores(),
    comparisons=make.comparisons(),
    offsets=make.offsets(),
    conflict=make.conflict(),
    links=make.links(),
    matrices=make.matrices(),
    flows=make.flows(),
    branch_similarity=make.branch_similarity(),
    similarity_differences=make.similarity_differences(),
    mantel=make.mantel(),
    noise=make.noise(),
    leak=make.leak(),
  )


def hostile(**options):
  """Names and errors that no page should be built from."""
  classes = (HOSTILE, '`x` **b** <b>', 'a\nb | c', '![i](http://e.org/i.png)', '"q" \'s\' &amp;')
  made = findings(classes=classes, **options)
  about = made.about | {
    'commands': [f"csba-study --workdir='{HOSTILE}/```'"],
  }
  error = f'{HOSTILE}\n```\n# heading \udcff\x1b[31m'
  notes = (f'run csba-{HOSTILE} failed: {error}', '# not a heading', '- not a list')
  return dataclasses.replace(made, name=f'study {HOSTILE}', about=about, notes=notes)


def bare(made):
  """What is left where nothing was measured but the test metrics."""
  empty = ('notes', 'comparisons', 'offsets', 'conflict', 'links', 'matrices', 'flows')
  empty += ('branch_similarity', 'similarity_differences', 'mantel', 'noise', 'leak', 'claims')
  return dataclasses.replace(made, about={}, **dict.fromkeys(empty, ()))


class _Maker:
  def __init__(self, variants, methods, classes, seeds, rng):
    self.variants, self.classes, self.seeds, self.rng = variants, classes, seeds, rng
    counts = np.array([int(5000 * 100 ** (-c / (len(classes) - 1))) for c in range(len(classes))])
    self.counts = tuple(counts // (1 + i) for i in range(len(methods)))
    common = {'model': 'multibranch', 'imbalance_factor': 100.0, 'width': 1.0, 'split': 'grouped'}
    self.cells = tuple({'method': method, **common} for method in methods)

  def estimate(self, value, spread=0.02, level=0.95, p=None, n=None):
    n = self.seeds if n is None else n
    if n < 2:
      return Estimate(value, NAN, NAN, level, n, NAN, f'no interval: {n} unit')
    half = spread * self.rng.uniform(0.6, 1.4)
    p = float(self.rng.uniform(0.01, 0.9)) if p is None else p
    return Estimate(value, value - half, value + half, level, n, p, f'bootstrap-t over {n} seeds')

  def comparison(self, treatment, control, cell, outcome, value, **more):
    level = more.pop('level', 0.95)
    spread = more.pop('spread', 0.015)
    control_mean = float(self.rng.uniform(0.4, 0.6))
    difference = self.estimate(value, spread, level)
    return lib.Comparison(
      treatment, control, cell, outcome, control_mean + value, control_mean, difference, **more
    )

  def pairs(self):
    for control in ('none', 'none_wide'):
      for treatment in ('csba', 'csba_class', 'se', 'cbam'):
        both = treatment in self.variants and control in self.variants
        if both and (treatment.startswith('csba') or control == 'none'):
          yield treatment, control

  def claims(self):
    found = 'difference +0.018, 95 % interval [+0.004, +0.031], n = 5, p (Holm) 0.041'
    numbers = f'csba − none, cross_entropy: {found}.'
    made = (
      ('CSBA helps', lib.SUPPORTED, (numbers,), 'CSBA has a higher macro-F1 than none.'),
      ('not by capacity alone', lib.REFUTED, (f'csba − none_wide: {found}.',), 'It is capacity.'),
      ('CSBA reduces conflict', lib.UNDECIDED, ('head-tail −0.03.', 'n = 5.'), 'It is open.'),
      ('Less conflict helps', lib.UNTESTED, ('Untested: no reduction.',), 'It was not tested.'),
      (
        'Overall: CSBA makes a better tail by less conflict',
        lib.UNDECIDED,
        ('The chain breaks at its second link.',),
        'It is open whether all links hold.',
      ),
    )
    return tuple(lib.Claim(*one) for one in made)

  def scores(self):
    made = []
    for cell in self.cells:
      for i, variant in enumerate(self.variants):
        base = np.linspace(0.85, 0.3, len(self.classes)) + 0.01 * i
        f1 = [self.estimate(float(x + self.rng.normal(0, 0.03)), 0.04) for x in base]
        confusion = self.rng.integers(0, 40, (len(self.classes),) * 2)
        confusion += np.diag(np.linspace(900, 250, len(self.classes)).astype(int))
        metrics = {
          name: self.estimate(float(self.rng.uniform(0.45, 0.7)))
          for name in ('macro_f1', 'accuracy', 'balanced_accuracy', 'head_f1', 'tail_f1')
        }
        made.append(lib.Score(cell, variant, 1_350_000 + 90_000 * i, metrics, f1, confusion))
    return tuple(made)

  def comparisons(self):
    return tuple(
      self.comparison(
        t, c, cell, 'macro-F1', float(self.rng.normal(0.012, 0.01)),
        adjusted_p=float(self.rng.uniform(0.01, 0.5)) if t.startswith('csba') else NAN,
        verdict=lib.UNDECIDED,
        missing=('csba without seed 3',) if t == 'csba' else (),
      )
      for cell in self.cells for t, c in self.pairs()
    )  # fmt: skip

  def offsets(self):
    return tuple(
      self.comparison('csba', 'none', cell, o, -0.004, level=0.9, verdict=lib.SUPPORTED)
      for cell in self.cells
      for o in ('accuracy', 'head F1')
      if 'csba' in self.variants
    )

  def places(self, scopes=('common', 'shared')):
    return [(at, part, scope) for at in SNAPSHOTS for part in PARTS for scope in scopes]

  def conflict(self):
    return tuple(
      self.comparison(
        t, 'none', cell | {'at': at, 'part': part, 'scope': scope}, measure,
        float(self.rng.normal(-0.03, 0.02)), spread=0.03,
      )
      for cell in self.cells for at, part, scope in self.places()
      for measure in ('head_tail_conflict', 'minority_interference', 'mean_cosine')
      for t, c in self.pairs() if c == 'none'
    )  # fmt: skip

  def links(self):
    made = []
    for cell in self.cells:
      for treatment, control in self.pairs():
        if control == 'none' and treatment.startswith('csba'):
          shape = (self.seeds, len(self.classes))
          reduction = self.rng.normal(0.1, 0.2, shape)
          gain = 0.1 * reduction + self.rng.normal(0, 0.04, shape)
          gain[0, 0] = NAN
          within, across = (self.estimate(value, 0.3) for value in (0.21, -0.1))
          made.append(
            lib.Link(
              treatment, control, cell, 'interference', within, across, reduction, gain, 'undecided'
            )
          )
    return tuple(made)

  def matrices(self):
    made = []
    for cell in self.cells:
      for i, variant in enumerate(self.variants):
        for at, part, scope in self.places():
          cosine = self.rng.normal(-0.1 + 0.02 * i, 0.12, (len(self.classes),) * 2)
          cosine = np.clip((cosine + cosine.T) / 2, -1, 1)
          cosine[1, 2] = cosine[2, 1] = NAN
          np.fill_diagonal(cosine, 1)
          made.append(lib.Matrix(cell, variant, at, part, scope, cosine, self.seeds))
    return tuple(made)

  def flows(self):
    made = []
    for cell in self.cells:
      for i, variant in enumerate(self.variants):
        for k, at in enumerate(SNAPSHOTS):
          for part in PARTS:
            norms = np.geomspace(0.2, 9, len(self.classes)) * self.rng.uniform(0.6, 1.5)
            shares = self.rng.dirichlet(np.ones(len(self.classes))) - 0.02
            scopes = {
              scope: {
                'conflict_rate': 0.5,
                'head_tail_conflict': float(0.7 - 0.05 * i + 0.04 * k + self.rng.normal(0, 0.02)),
                'mean_cosine': float(-0.1 + 0.02 * i + self.rng.normal(0, 0.02)),
                'minority_interference': float(0.6 + self.rng.normal(0, 0.05)),
              }
              for scope in SCOPES
            }
            loss = float(2.3 / (k + 1))
            made.append(lib.MeanFlow(cell, variant, at, part, norms, shares, scopes, loss))
    return tuple(made)

  def similarity_differences(self):
    blocks = ('stage1/block1', 'stage3/block2')
    pairs = [(t, c) for t, c in self.pairs() if c == 'none']
    return tuple(
      self.comparison(t, c, cell | {'at': '1', 'part': 'train'}, f'CKA of {block}', -0.1)
      for cell in self.cells
      for t, c in pairs
      for block in blocks
    )

  def branch_similarity(self):
    blocks = [f'stage{s}/block{b}' for s in (1, 2, 3) for b in (1, 2)]
    return tuple(
      lib.BranchSimilarity(
        cell, variant, at, 'train',
        {block: float(self.rng.uniform(0.2, 0.8)) for block in blocks},
        {b: float(self.rng.uniform(0, 0.1)) for b in blocks} if 'csba' in variant else {},
        {b: np.full((3, len(self.classes)), 0.5) for b in blocks} if 'csba' in variant else {},
      )
      for cell in self.cells for variant in self.variants for at in ('0', '1')
    )  # fmt: skip

  def mantel(self):
    words = f'Mantel, Spearman, {len(self.classes)} of {len(self.classes)} classes'
    n = len(self.classes)
    return (
      ('conflict of none and of csba', Estimate(0.61, NAN, NAN, 0.95, n, 0.004, words), 0.004),
      ('conflict and confusion, none', Estimate(-0.18, NAN, NAN, 0.95, n, 0.31, words), 0.31),
    )

  def noise(self):
    return tuple(
      self.comparison(v, v, cell, 'macro-F1', 0.002) for cell in self.cells for v in self.variants
    )

  def leak(self):
    return tuple(
      self.comparison(f'{v}, naive split', f'{v}, grouped folds', self.cells[0], 'macro-F1', 0.06)
      for v in self.variants[:2]
    )

  def about(self):
    return {
      'commands': ['csba-study --config=configs/study.py --workdir=runs/cifar10_lt'],
      'versions': {'python': '3.11.7', 'jax': '0.10.2', 'csba_jax': '0.5.0'},
      'commits': ['adb1c7d0'],
      'devices': ['NVIDIA H100 80GB HBM3'],
      'runs': self.seeds * len(self.variants) * len(self.cells) - 1,
      'failed': 1,
      'seconds': 51234.5,
      'config': {
        'name': 'cifar10_lt',
        'margin': 0.02,
        'smallest_effect': 0.01,
        'seeds': list(range(self.seeds)),
        'base': {'train': {'steps': 3000, 'rate': NAN}},
      },
    }
