"""What the report of a run says: sections that the page and the card share."""

import io
import math
from collections.abc import Sequence

import numpy as np

from csba_jax.analysis.advice.rules import Finding
from csba_jax.analysis.run_facts import Mistake, RunFacts
from csba_jax.data.class_counts import by_frequency
from csba_jax.files import expanded
from csba_jax.gradients.drawing import color_limit
from csba_jax.measure.calibration import LEAST, Calibration, calibration_error
from csba_jax.report.html import svg
from csba_jax.report.html.blocks import Block, Figure, Items, Photos, Section, Table, Text, Verdict
from csba_jax.report.terminal import advice as advice_text
from csba_jax.runtime import plain

FEW = 20  # test images of a class, below which its numbers are named as uncertain
NAMED = 12  # classes in one sentence
THUMBNAIL, QUALITY = 128, 85  # pixels of the longer side at least, and of JPEG
_NARROW = 340  # pixels of a figure, which a phone shows whole
_ROOM = 240  # pixels for its axis, beside names that are longer than usual
_DASH = '-'


def title(facts: RunFacts) -> str:
  """'photos: macro-F1 0.58 on 176 test images of 6 classes'."""
  result, name = facts.result, expanded(facts.workdir).resolve().name
  return plain.clean(
    f'{name}: macro-F1 {_number(result["macro_f1"])} on {result["examples"]:,} test '
    f'images of {len(facts.metadata.class_names)} classes'
  )


def results(facts: RunFacts) -> Section:
  """Headline numbers, and a table of the classes with intervals."""
  result, of = facts.result, facts.rates
  low, high = of.macro_f1
  lines = [
    f'Macro-F1 {_number(result["macro_f1"])} (95 % interval {_number(low)} to {_number(high)}), '
    f'balanced accuracy {_number(result["balanced_accuracy"])}, accuracy '
    f'{_number(result["accuracy"])}, on {result["examples"]:,} test images.',
    'Intervals are for the images that were tested. Another training, with another seed or split, '
    'would differ by more.',
  ]
  return Section(
    'Results',
    'results',
    [Items(lines), *_uncertain(facts), _f1_figure(facts), class_table(facts)],
  )


def class_table(facts: RunFacts) -> Table:
  """Precision, recall and F1 of each class, largest first, with 95 % intervals."""
  per_class, of = facts.result['per_class'], facts.rates
  rows = []
  for c in _order(facts):
    rows.append(
      [
        _name(facts, c),
        f'{facts.metadata.class_counts[c]:,}',
        f'{per_class["support"][c]:,}',
        _number(per_class['precision'][c]),
        _with_interval(per_class['recall'][c], of.recall[c]),
        _with_interval(per_class['f1'][c], of.f1[c]),
      ]
    )
  head = ['class', 'training images', 'test images', 'precision', 'recall', 'F1']
  return Table('Each class, with 95 % intervals of recall and F1', head, rows)


def confusion(facts: RunFacts) -> Section:
  """The confusion matrix, rows in percent of the true class."""
  counts = np.asarray(facts.result['confusion_matrix'], np.float64)
  order = _order(facts)
  support = np.maximum(counts.sum(1, keepdims=True), 1)
  rows = (counts / support)[np.ix_(order, order)]
  labels = [f'{_name(facts, c)} ({int(counts[c].sum()):,})' for c in order]

  def draw() -> Sequence[str]:
    what = 'Confusion, % of the true class'
    return [svg.heat_map(rows, labels, title=what, limit=1.0, percent=True, diagonal=True)]

  caption = (
    'Rows are true classes with their test images, columns are predictions in the same order; '
    'numbers are percent of the row.'
  )
  return Section('Which classes are taken for which', 'confusion', [Figure(caption, draw)])


def mistakes(facts: RunFacts) -> Section:
  """The wrong predictions that the net is surest of, as pictures."""
  heading, anchor = 'The surest mistakes', 'mistakes'
  if not facts.mistakes:
    text = facts.no_mistakes or 'No test image was predicted wrongly.'
    return Section(heading, anchor, [Text(plain.clean(text), 'note' if facts.no_mistakes else '')])
  names = facts.metadata.class_names
  lead = (
    'Test images whose predicted class is not their label, surest first. Some labels may be wrong. '
    'The pictures are part of this page: keep it as private as the photos.'
  )
  pictures = [
    (
      picture(one),
      f'{names[one.predicted]} {one.probability:.2f}, labelled {names[one.label]}: {one.name}',
    )
    for one in facts.mistakes
  ]
  return Section(heading, anchor, [Text(lead), Photos(pictures)])


def conflict(facts: RunFacts) -> Section:
  """The conflict matrix of the latest measurement."""
  heading, anchor, found = 'Conflict between classes', 'conflict', facts.conflict
  if found is None:
    text = f'Not measured. Measure it: csba-diagnose --workdir={facts.workdir}'
    return Section(heading, anchor, [Text(plain.clean(text))])
  order = found.by_frequency
  cosines = np.where(found.resolvable(), found.cosine(), np.nan)[np.ix_(order, order)]
  names = [
    f'{plain.clean(found.class_names[c])} ({int(found.class_counts[c]):,})' for c in order.tolist()
  ]

  def draw() -> Sequence[str]:
    limit = color_limit([cosines])
    return [svg.heat_map(cosines, names, title='Cosines of class gradients', limit=limit)]

  caption = (
    'Cosines of the gradients of two classes in all layers but the classifier. Negative: a step '
    'for one class raises the loss of the other. Grey: not resolvable.'
  )
  return Section(heading, anchor, [Text(conflict_sentence(facts)), Figure(caption, draw)])


def conflict_sentence(facts: RunFacts) -> str:
  """How many pairs are in conflict, at which step, of which images."""
  found = facts.conflict
  if found is None:
    return 'Conflict of class gradients was not measured.'
  measures, classes = found.summary(), len(found.class_names)
  undone, pairs = measures['minority_interference'], classes * (classes - 1) // 2
  images = f'{int(found.counts.sum()):,} images ({plain.clean(str(found.about.get("target", "")))})'
  text = (
    f'Class gradients at step {found.about.get("step", 0):,}, {images}: of {pairs} pairs of '
    f'classes {measures["pairs_in_conflict"]} are in conflict, {measures["pairs_in_agreement"]} in '
    f'agreement and {measures["pairs_not_resolvable"]} not resolvable.'
  )
  if not math.isnan(undone):
    text += f' Other classes undo {100 * undone:.0f} % of what a rare class gains, on average.'
  return text


def advice(facts: RunFacts) -> Section:
  """What the rules found, and what to do next."""
  shown = [Verdict(f.rule, _verdict(f), [f.text]) for f in facts.advice]
  following = advice_text.next_step(facts.advice, facts.workdir)
  lead = 'From validation images and the conflict of training images; the test images are not used.'
  return Section('Advice', 'advice', [Text(lead), *shown, Text(f'Next: {following}')])


def data_on_page(facts: RunFacts) -> Section:
  """`data`, and where the photos of the audit are."""
  section = data(facts)
  more = [Text('audit.html beside this page has the photos.', 'small')] if facts.audit else []
  return section._replace(blocks=[*section.blocks, *more])


def data(facts: RunFacts) -> Section:
  """What the audit of csba-train --data has found; else the source alone."""
  counts, found = facts.metadata.class_counts, facts.audit
  most, least = int(counts.argmax()), int(counts.argmin())
  lines = [
    f'Source: {facts.config.data.source}. {int(counts.sum()):,} training images of {len(counts)} '
    f'classes, {counts[most]:,} of {_name(facts, most)} and {counts[least]:,} of '
    f'{_name(facts, least)}.'
  ]
  if found:
    for key, text in (
      ('unreadable', 'Files that cannot be read'),
      ('identical', 'Sets of byte-identical photos'),
      ('copies', 'Sets of photos that are copies or look the same'),
      ('copies_across_classes', 'Of these, sets in more than one class (labels to check)'),
      ('copies_across_parts', 'Of these, sets in more than one part of the data'),
    ):
      if found.get(key):
        lines.append(f'{text}: {len(found[key]):,}.')
  return Section('Data', 'data', [Items(lines)])


def calibration_sentence(facts: RunFacts, calibration: Calibration) -> str:
  """What a calibration does to the calibration error of validation images."""
  if facts.validation is None or len(facts.validation.labels) < LEAST:
    return 'Probabilities are not calibrated: the run has kept too few validation images, or none.'
  nothing = Calibration(1.0, np.zeros(len(facts.metadata.class_names)))
  if calibration.bias.any():
    return (
      f'Probabilities are calibrated with temperature {calibration.temperature:.2f} on '
      f'{len(facts.validation.labels):,} validation images, for other class shares than theirs.'
    )
  before, after = (calibration_error(facts.validation, c) for c in (nothing, calibration))
  return (
    f'Probabilities are calibrated with temperature {calibration.temperature:.2f} on '
    f'{len(facts.validation.labels):,} validation images; their calibration error is {after:.3f}, '
    f'without it {before:.3f}.'
  )


def few_classes(facts: RunFacts) -> str:
  """A sentence on the classes with fewer than FEW test images; '' if there are none."""
  support = facts.result['per_class']['support']
  few = [f'{_name(facts, c)} ({support[c]})' for c in _order(facts) if support[c] < FEW]
  if not few:
    return ''
  listed = ', '.join(few[:NAMED]) + (f' and {len(few) - NAMED} more' if len(few) > NAMED else '')
  return f'Fewer than {FEW} test images, so that little can be said: {listed}.'


def picture(one: Mistake) -> bytes:
  """A JPEG file of an image, enlarged without smoothing if it is small."""
  from PIL import Image

  image = Image.fromarray(one.image[..., 0] if one.image.shape[-1] == 1 else one.image)
  times = max(1, THUMBNAIL // max(image.size))
  image = image.resize([times * n for n in image.size], Image.Resampling.NEAREST)
  image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
  file = io.BytesIO()
  image.convert('RGB').save(file, 'JPEG', quality=QUALITY)
  return file.getvalue()


def _uncertain(facts: RunFacts) -> list[Block]:
  few = few_classes(facts)
  return [Text(few, 'note')] if few else []


def _f1_figure(facts: RunFacts) -> Figure:
  order = _order(facts)
  f1, ends = facts.result['per_class']['f1'], facts.rates.f1
  values = [
    (math.nan if f1[c] is None else float(f1[c]), float(ends[c, 0]), float(ends[c, 1]))
    for c in order
  ]
  names = [f'{_name(facts, c)} ({facts.metadata.class_counts[c]:,})' for c in order]

  def draw() -> Sequence[str]:
    series = [svg.Series('F1', values, 0)]
    limits = (0.0, 1.0)
    width = max(_NARROW, round(_ROOM + max(svg.text_width(svg.short(n, 290)) for n in names)))
    return [svg.dots(names, series, title='F1', axis='F1', limits=limits, width=width)]

  return Figure('F1 of each class with its 95 % interval; in brackets its training images.', draw)


def _verdict(finding: Finding) -> str:
  return {'yes': 'a problem', 'no': 'no problem', 'not known': 'not known'}[finding.verdict]


def _order(facts: RunFacts) -> list[int]:
  return by_frequency(facts.metadata.class_counts).tolist()


def _name(facts: RunFacts, c: int) -> str:
  return plain.clean(facts.metadata.class_names[c])


def _number(value: float | None) -> str:
  return _DASH if value is None or math.isnan(value) else f'{value:.3f}'


def _with_interval(value: float | None, ends: np.ndarray) -> str:
  if value is None or math.isnan(value) or np.isnan(ends).any():
    return _number(value)
  return f'{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})'
