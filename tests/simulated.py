"""A study's folder without a study: records as of real runs, whose effects are known."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from csba_jax.gradients import conflict as conflict_lib

VARIANTS = ('none', 'none_wide', 'se', 'cbam', 'csba', 'csba_class')
TREATED = ('csba', 'csba_class')  # whom the effects are given to
CLASSES = ('clean', 'dusty', 'snow', 'broken')
COUNTS = np.array([400, 160, 60, 12])  # training images: two many-shot classes, two others
PRIOR = COUNTS / COUNTS.sum()
SNAPSHOTS = {'0': 0, '0.1': 30, 'loss 1': 45, '0.5': 150, 'loss 0.3': 210, '1': 300}
SCOPES = ('stem', 'stage1', 'stage2', 'stage3', 'branch1x1', 'branch3x3', 'branch5x5')
PARAMETERS = dict(zip(VARIANTS, (250_000, 340_100, 262_000, 262_300, 340_634, 341_900)))  # noqa: B905
VERSIONS = {'python': '3.11.7', 'csba_jax': '0.5.0', 'jax': '0.10.2', 'numpy': '2.4.0'}


def study(folder, **options) -> Path:
  """Writes study.json and results.jsonl; `options` as of `make`. Returns the folder."""
  return write(folder, *make(**options))


def write(folder, about, records) -> Path:
  """A study's folder of these records, one line each."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'study.json').write_text(json.dumps(about, indent=2) + '\n')
  lines = ''.join(json.dumps(record, allow_nan=False) + '\n' for record in records)
  (folder / 'results.jsonl').write_text(lines)
  return folder


def make(
  seeds=8,  # repeats of the cross-validation where there are folds
  effect=0.06,  # of csba and csba_class on every class's recall; about that on macro-F1
  conflict_effect=0.2,  # by how much they raise the cosines between classes, after snapshot '0'
  link=0.0,  # correlation of a class's conflict reduction with its gain, over units
  folds=0,
  variants=VARIANTS,
  methods=('cross_entropy',),
  capacity=0.0,  # of none_wide on every class's recall
  accuracy=0.0,  # of csba and csba_class on the recall of the head classes, beside `effect`
  leak=None,  # what a naive split adds to recall; None: no naive split
  outcome='macro_f1',
  redrawn=False,  # seeds redraw their test parts from one set of images
  name='simulated',
  pairs=(),  # of variants, that the study declares for itself
  own_methods=None,  # likewise {name: {field: value}}; None: a study.json from before them
  rng=0,
):
  """(study.json, records) of a full grid; everything follows from the arguments."""
  config = {
    'name': name,
    'variants': list(variants),
    'methods': list(methods),
    'seeds': seeds,
    'repeats': seeds if folds else 1,
    'outcome': outcome,
    'margin': 0.02,
    'smallest_effect': 0.01,
    'base': {'data': _data(folds, redrawn), 'train': {'epochs': 10}},
  }
  if own_methods is not None:
    config |= {'pairs': [list(pair) for pair in pairs], 'own_methods': own_methods}
  sha = _sha(config)
  about = {
    'name': name,
    'config': config,
    'command': f'csba-study --config=configs/{name}.py --workdir=runs/{name}',
    'versions': VERSIONS,
    'commit': 'a' * 40,
  }
  records = []
  for split in ('grouped',) if leak is None else ('grouped', 'naive'):
    for method_index, method in enumerate(methods):
      for seed in range(seeds):
        for fold in range(max(folds, 1)):
          key = [rng, split == 'naive', method_index, seed, fold]
          drawn = np.random.default_rng(key)
          shared = {  # what all variants of a unit have in common
            'recall': drawn.normal(0, 0.01, 4),
            'cosine': drawn.normal(0, 0.03, (2, 4, 4)),
            'coupling': drawn.normal(0, 1, 4),
            'other': drawn.normal(0, 1, 4),
          }
          for variant in variants:
            treated = variant in TREATED
            gain = effect * treated + capacity * (variant == 'none_wide')
            recall = np.array([0.85, 0.75, 0.6, 0.4]) + 0.1 * (method != 'cross_entropy')
            recall += gain + (accuracy * treated) * np.array([1, 1, 0, 0]) + shared['recall']
            mixed = link * shared['coupling'] + math.sqrt(1 - link**2) * shared['other']
            recall += 0.02 * mixed * treated + (leak or 0) * (split == 'naive')
            own = np.random.default_rng([*key, VARIANTS.index(variant), 1])
            recall += own.normal(0, 0.008, 4)
            repeat = seed if folds else 0
            axes = _axes(variant, method, split, repeat, fold, seed)
            run = f'{variant}-{method}-{split}-s{seed}-f{fold}'
            records.append(
              {
                'schema': 1,
                'study': name,
                'run': run,
                'status': 'done',
                'axes': axes,
                'config': _config(seed, variant, (own_methods or {}).get(method, {})),
                'config_sha256': sha,
                'versions': VERSIONS,
                'commit': 'a' * 40,
                'device': 'simulated CPU',
                'seconds': round(10 + 5 * own.random(), 1),
                'result': _result(np.clip(recall, 0.02, 0.98), variant, own, 5 if folds else 1)
                | {'splits_sha256': _sha([split, seed, fold]), 'source_sha256': _sha(name)}
                | {'content_sha256': '7' * 64},
                'conflict': _conflict(shared, conflict_effect * treated, treated, own),
                'branches': _branches(variant, own),
              }
            )
  return about, records


def _config(seed, variant, changes):
  config = {'seed': seed, 'model': {'attention': variant}}
  for field, value in changes.items():
    section, name = field.split('.')
    config.setdefault(section, {})[name] = value
  return config


def _axes(variant, method, split, repeat, fold, seed):
  own = {'split': split, 'repeat': repeat, 'fold': fold, 'seed': seed}
  size = {'imbalance_factor': 33.0, 'width': 0.25, 'depth': 1, 'learning_rate': 0.05}
  return {'model': 'multibranch', 'variant': variant, 'method': method, **size, **own}


def tuning(scores):
  """(study.json, records) of a study that only tunes; runs of a rate are seeds 0, 1, ....

  Args:
    scores: {variant: {learning rate: [validation score, ...]}}.
  """
  about, _ = make(seeds=1, variants=tuple(scores), name='tuning')
  about['config']['test'] = False
  about['config']['seeds'] = max(len(v) for by_rate in scores.values() for v in by_rate.values())
  records = []
  for variant, by_rate in scores.items():
    for rate, values in by_rate.items():
      _, made = make(seeds=len(values), variants=(variant,), name='tuning')
      for record, score in zip(made, values, strict=True):
        del record['conflict'], record['branches']
        record['run'] += f'-lr{rate:g}'
        record['axes']['learning_rate'] = rate
        record['config_sha256'] = 'c' * 64
        record['result'] = {'validation_macro_f1': score, 'parameters': PARAMETERS[variant]}
        records.append(record)
  return about, records


def _sha(of):
  return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _data(folds, redrawn):
  if folds or redrawn:
    return {'folds': folds, 'source': 'digits', 'test_split': 'test', 'test_fraction': 0.3}
  return {'folds': 0, 'source': 'tfds', 'test_split': 'test', 'test_fraction': 0.2}


def _result(recall, variant, own, fewer):
  """Metrics as `csba_jax.methods.metrics.summarise` defines them, of a matrix with this recall."""
  support = np.array([400, 300, 200, 100]) // fewer  # a fold is smaller than what it trains on
  spread = np.where(np.eye(4, dtype=bool), 0, np.sqrt(PRIOR))
  spread = spread / spread.sum(1, keepdims=True)
  counts = np.rint(support[:, None] * (1 - recall)[:, None] * spread).astype(int)
  counts[np.diag_indices(4)] = support - counts.sum(1)
  hit, predicted = np.diag(counts), counts.sum(0)
  f1, recall = 2 * hit / (support + predicted), hit / support
  return {
    'examples': int(support.sum()),
    'accuracy': float(hit.sum() / support.sum()),
    'macro_f1': float(f1.mean()),
    'balanced_accuracy': float(recall.mean()),
    'loss': float(-np.log(recall).mean()),
    'expected_calibration_error': float(0.05 + 0.02 * own.random()),
    'per_class': {
      'precision': (hit / predicted).tolist(),
      'recall': recall.tolist(),
      'f1': f1.tolist(),
      'support': support.tolist(),
    },
    'group_accuracy': {
      'many': float(recall[:2].mean()),
      'medium': float(recall[2]),
      'few': float(recall[3]),
    },
    'confusion_matrix': counts.tolist(),
    'class_names': list(CLASSES),
    'class_counts': COUNTS.tolist(),
    'parameters': PARAMETERS[variant],
    'checkpoint_step': 300,
    'validation_macro_f1': float(f1.mean()),
  }


def _conflict(shared, effect, treated, own):
  """Entries of every snapshot and part."""
  entries = []
  for index, (at, step) in enumerate(SNAPSHOTS.items()):
    done = step / max(SNAPSHOTS.values())
    for part, noise in zip(('train', 'val'), shared['cosine'], strict=True):
      # coupling of class c with every more frequent class; the treated lose most where it is high
      coupling = 0.1 + 0.04 * shared['coupling'] * (-1 if treated else 1) * (step > 0)
      coupling = coupling - effect * (step > 0)
      rarer = np.maximum.outer(np.arange(4), np.arange(4))
      cosines = -coupling[rarer] + (noise + noise.T) + own.normal(0, 0.01, (4, 4))
      cosines = np.clip((cosines + cosines.T) / 2, -0.95, 0.95)
      np.fill_diagonal(cosines, 1)
      norms = 1 + done * (np.array([0.4, 0.7, 1.5, 2.5]) - 1) + own.normal(0, 0.02, 4)
      gram = norms[:, None] * norms * cosines
      losses = np.array([0.2, 0.4, 0.9, 1.6]) * (1.6 - 1.5 * done) + own.normal(0, 0.01, 4)
      entries.append(
        {
          'at': at,
          'step': step + (index and int(own.integers(0, 3))),
          'part': part,
          'loss': float(PRIOR @ losses),
          'losses': losses.tolist(),
          'counts': [48, 48, 48, 12],
          'prior': PRIOR.tolist(),
          'grams': {'shared': _packed(1.1 * gram), 'common': _packed(gram)},
          'scopes': _scopes(cosines, gram, own),
        }
      )
  return entries


def _packed(gram):
  """Upper triangle row by row, as results.jsonl holds it."""
  return gram[np.triu_indices(len(gram))].tolist()


def _scopes(cosines, gram, own):
  upper = cosines[np.triu_indices(4, 1)]
  whole = {
    'conflict_rate': float((upper < 0).mean()),
    'head_tail_conflict': float((cosines[:2, 2:] < 0).mean()),
    'mean_cosine': float(upper.mean()),
    'minority_interference': float(
      np.minimum(conflict_lib.interference(gram, PRIOR)[2:], 1).mean()
    ),
  }
  layers = {
    scope: {key: value + float(own.normal(0, 0.01)) for key, value in whole.items()}
    for scope in SCOPES
  }
  return {'shared': whole, 'common': dict(whole), **layers}


def _alike(value):
  return [[1.0 if a == b else value for b in range(3)] for a in range(3)]


def _branches(variant, own):
  blocks = ('stage1/block1', 'stage2/block1', 'stage3/block1')
  gated = variant in TREATED
  gates = [[0.4, 0.5, 0.5, 0.6], [0.5] * 4, [0.6] * 4]  # [B, C]
  base = 0.45 if gated else 0.6
  return [
    {
      'at': at,
      'part': 'train',
      'cka': {block: _alike(round(base + float(own.normal(0, 0.02)), 3)) for block in blocks},
      'gates': dict.fromkeys(blocks, gates) if gated else {},
      'gate_spread': dict.fromkeys(blocks, 0.04) if gated else {},
    }
    for at in ('0', '1')
  ]
