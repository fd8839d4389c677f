"""The model card of an exported net: Markdown with the metadata that model hubs read."""

import json
from typing import Any

import numpy as np

from csba_jax.analysis.run_facts import RunFacts
from csba_jax.export import folder
from csba_jax.measure.predict import Predictor
from csba_jax.report import markdown
from csba_jax.report.html.blocks import Block, Code, Items, Section, Table, Text
from csba_jax.report.run import content
from csba_jax.runtime import plain


def render(facts: RunFacts, predictor: Predictor, min_confidence: float, name: str) -> str:
  """The text of README.md.

  Args:
    facts: of the run.
    predictor: what is exported.
    min_confidence: below it no class is predicted.
    name: of the net.
  """
  calibrated = content.calibration_sentence(facts, predictor.calibration)
  sections = [
    _use(predictor, min_confidence),
    Section('Results', 'results', _results(facts, predictor, min_confidence)),
    Section('Calibration', 'calibration', [Text(calibrated)]),
    Section('Conflict between classes', 'conflict', [Text(content.conflict_sentence(facts))]),
    content.data(facts),
    Section('Limits', 'limits', [Items(_limits(facts))]),
  ]
  heading = f'# {markdown.escape(name)}: images of {len(facts.metadata.class_names)} classes'
  parts = [_metadata(facts, name), heading]
  for section in sections:
    parts += [f'## {section.title}', *markdown.render(section.blocks)]
  return '\n\n'.join(parts) + '\n'


def _metadata(facts: RunFacts, name: str) -> str:
  """The block of YAML at the top; texts are JSON strings, which are YAML too."""
  result = facts.result

  def metric(title: str, value: float | None) -> dict[str, Any]:
    return {'type': 'f1' if 'F1' in title else 'accuracy', 'name': title, 'value': value}

  index = {
    'name': plain.clean(name),
    'results': [
      {
        'task': {'type': 'image-classification'},
        'dataset': {'type': facts.config.data.source, 'name': facts.config.data.source},
        'metrics': [
          metric('macro-F1', result['macro_f1']),
          metric('balanced accuracy', result['balanced_accuracy']),
          metric('accuracy', result['accuracy']),
        ],
      }
    ],
  }
  lines = [
    '---',
    'library_name: jax',
    'pipeline_tag: image-classification',
    'tags: [jax, flax, long-tail, csba_jax]',
    f'model-index: {json.dumps([index], ensure_ascii=False)}',
    '---',
  ]
  return '\n'.join(lines)


def _results(facts: RunFacts, predictor: Predictor, min_confidence: float) -> list[Block]:
  blocks: list[Block] = [content.results(facts).blocks[0], content.class_table(facts)]
  changed = min_confidence or predictor.calibration.bias.any() or (predictor.weights != 1).any()
  if changed:
    text = 'These results are of the most probable class, without the weights, class shares and '
    blocks.append(Text(f'{text}least confidence that this folder was exported with.'))
  return blocks


def _use(predictor: Predictor, min_confidence: float) -> Section:
  net, channels = predictor.net, predictor.net.metadata.image_shape[-1]
  size = net.metadata.image_shape[0]
  mode = {1: 'grey', 3: 'RGB'}[channels]
  lines = [
    f'{folder.PROGRAM}: the net as a StableHLO program for CPU, CUDA and TPU (jax.export). It '
    f'takes uint8 images [n, {size}, {size}, {channels}] ({mode}) and returns calibrated '
    f'probabilities [n, {net.num_classes}].',
    f'{folder.ABOUT}: class names, weights of classes and the least confidence.',
    f'{folder.SCRIPT}: reads photos as in training (upright, the centre square, bicubic) and '
    'predicts.',
    f'{folder.WEIGHTS}: the parameters, for other programs.',
  ]
  blocks: list[Block] = [
    Code(f'pip install jax flatbuffers Pillow\npython {folder.SCRIPT} photo.jpg'),
    Items(lines),
  ]
  weights = predictor.weights
  if (weights != 1).any():
    names = net.metadata.class_names
    rows = [[plain.clean(names[c]), f'{weights[c]:.3g}'] for c in np.flatnonzero(weights != 1)]
    text = 'Probabilities of these classes are multiplied before the largest is taken'
    blocks.append(Table(text, ['class', 'weight'], rows))
  if min_confidence:
    blocks.append(Text(f'Below a probability of {min_confidence:g} no class is predicted.'))
  return Section('Use', 'use', blocks)


def _limits(facts: RunFacts) -> list[str]:
  lines = [
    'It was tested on images of the same source as those that it was trained on. Photos from '
    'another camera, place or time may be harder.',
    'Every photo gets one of the classes, also one that shows nothing of the kind.',
    'The numbers are of one training.',
  ]
  few = content.few_classes(facts)
  return [*lines, few] if few else lines
