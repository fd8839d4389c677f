"""Computes what a run would need on 1 to 1,024 devices: the tables of docs/scaling.md.

  python -m benchmarks.scaling                            # all lines, each in a new process
  python -m benchmarks.scaling --line=CASE,DEVICES,BATCH  # one line, as JSON
  python -m benchmarks.scaling --write                    # docs/scaling.md from the last results

It reads the numbers off compiled programs and needs no accelerator. A line takes ten to forty
seconds of one CPU core, and 1.2 GiB.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / 'benchmarks/results/scaling.json', ROOT / 'docs/scaling.md'
BEGIN, END = '<!-- tables: python -m benchmarks.scaling -->', '<!-- end of tables -->'
DEVICES = (1, 8, 64, 256, 1024)
GLOBAL, PER_DEVICE = 1024, 128  # images of a step: of all devices, and of each
HARDWARE = ('h100', 'v5e')
# name: (title, training images, fields)
CASES = {
  'imagenet_lt': (
    'ImageNet-LT: 1,000 classes',
    115_846,
    {'data.num_classes': 1000, 'diagnostics.statistics': 'frozen', 'diagnostics.images': 8},
  ),
  'inaturalist': (
    'iNaturalist 2018: 8,142 classes',
    437_513,
    {'data.num_classes': 8142, 'diagnostics.statistics': 'frozen', 'diagnostics.images': 4},
  ),
}
# the net of the paper at its size, on photos of 224 pixels with crops and flips
COMMON = {
  'data.image_size': 224,
  'augment.crop_padding': 28,
  'model.width': 1.0,
  'model.dtype': 'bfloat16',
  'loss.name': 'balanced_softmax',
}


def fields(case: str, devices: int, batch: int) -> dict[str, object]:
  """Fields that differ from configs/image_folder.py."""
  own = {'train.batch_size': batch, 'parallel.fake_devices': devices}
  return COMMON | CASES[case][2] | own


def command(case: str) -> str:
  """The command that prints the same numbers."""
  changed = [f'--config.{k}={v}' for k, v in fields(case, 'DEVICES', 'BATCH').items()]
  return ' '.join(['csba-train --dry_run --config=configs/image_folder.py', *changed])


def measure(case: str, devices: int, batch: int) -> dict[str, object]:
  """One line of the tables: both programs on a mesh of `devices` devices."""
  from csba_jax import config as config_lib
  from csba_jax.errors import UserError
  from csba_jax.gradients.gram import layer_name
  from csba_jax.planning import collectives, dry_run, hardware

  config = config_lib.sibling(str(ROOT / 'configs/scaling.py'), 'image_folder')
  for field, value in fields(case, devices, batch).items():
    section, name = field.split('.')
    config[section][name] = value
  config.parallel.devices = devices
  config_lib.check(config)
  dry_run.use_fake_devices(devices)
  setting = dry_run.Setting.of(config)

  def on(cost, name):
    accelerator = hardware.find(name)
    taken = dry_run.seconds(setting, cost, accelerator)
    return {
      'seconds': taken.total,
      'compute': taken.compute,
      'memory': taken.memory,
      'communication': taken.communication,
      'fits': cost.held <= accelerator.memory,
    }

  def program(make):
    began = time.monotonic()
    cost = make()
    kinds = collectives.by_kind(cost.collectives)
    return {
      'compile_seconds': round(time.monotonic() - began, 1),
      'held': cost.held,
      'flops': cost.flops,
      'highest_flops': cost.highest_flops,
      'bytes_accessed': cost.bytes_accessed,
      'sent': {kind: [t.number, t.bytes, t.sent] for kind, t in kinds.items()},
      'on': {name: on(cost, name) for name in HARDWARE},
    }

  room = max(hardware.find(name).memory for name in HARDWARE)
  training = program(lambda: dry_run.Cost.of(dry_run.compile_training(setting), devices))
  found = {'probe': {}, 'body': {}}
  try:
    found['probe'] = program(lambda: dry_run.measure_probe(setting, room))
  except UserError as error:
    found['probe'] = {'error': str(error)}
    if batch == GLOBAL:

      def body(name):
        return None if re.search(setting.model.head, name) else layer_name(name)

      found['body'] = program(lambda: dry_run.measure_probe(setting, room, 1, body))
  return {
    'case': case,
    'devices': devices,
    'batch': batch,
    'parameters': setting.parameters,
    'training': training,
    **found,
    'peak_mebibytes': environment.peak_mebibytes(),
  }


def run_all(cases: Sequence[str]) -> None:
  """Computes the lines of these cases, each in a new process: that fixes its number of devices."""
  lines = []
  if RESULTS.exists():
    kept = json.loads(RESULTS.read_text())['lines']
    lines = [line for line in kept if line['case'] not in cases]
  wanted = {(n, batch) for n in DEVICES for batch in (GLOBAL, n * PER_DEVICE)}
  for case in cases:
    for devices, batch in sorted(wanted):
      line = f'{case},{devices},{batch}'
      print(line, file=sys.stderr)
      made = subprocess.run(
        [sys.executable, '-m', 'benchmarks.scaling', f'--line={line}'],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
      )
      lines.append(json.loads(made.stdout))
      about = {'date': datetime.date.today().isoformat(), **environment.describe()}
      RESULTS.write_text(json.dumps({'about': about, 'lines': lines}, indent=1) + '\n')


def tables(found: dict) -> str:
  """All lines as Markdown."""
  about = found['about']
  versions = ', '.join(f'{k} {about[k]}' for k in ('jax', 'jaxlib') if k in about)
  parts = [f'Made on {about["date"]} with {versions or about}, commit {str(about["commit"])[:12]}.']
  for case, (title, images, _) in CASES.items():
    lines = [line for line in found['lines'] if line['case'] == case]
    parts += [f'### {title}', _intro(case, lines[0], images)]
    for what, of in (
      (f'{GLOBAL} images a step, shared by all devices', lambda n: GLOBAL),
      (f'{PER_DEVICE} images a step for each device', lambda n: n * PER_DEVICE),
    ):
      chosen = [line for line in lines if line['batch'] == of(line['devices'])]
      parts += [f'Training, {what}:', _training(chosen, images)]
    chosen = [line for line in lines if line['batch'] == GLOBAL]
    parts += ['One measurement of the conflict matrix (the probe of `diagnostics.every`):']
    parts += [_errors(chosen) or _probe(chosen, 'probe')]
    if chosen[0].get('body'):
      parts += [
        'The plain Gram of every class over the same images, one row a class and without the head, '
        'by the same program (`dry_run.measure_probe(setting, room, 1, layer_fn)`):',
        _probe(chosen, 'body'),
      ]
  return '\n\n'.join(parts)


def _intro(case: str, line: dict, images: int) -> str:
  return (
    f'{line["parameters"]:,} parameters, {images:,} training images. Each line is from\n\n'
    f'<!-- not run: DEVICES and BATCH stand for numbers -->\n\n```shell\n{command(case)}\n```\n\n'
    'with DEVICES and BATCH of the line.'
  )


def _table(header: list[str], rows: list[list[str]]) -> str:
  rule = ['---:'] * len(header)
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, rule, *rows))


def _sent(program: dict) -> str:
  kinds = [f'{kind} {_size(sent)}' for kind, (_, _, sent) in program['sent'].items()]
  return ', '.join(kinds) or 'nothing'


def _size(number: float) -> str:
  return f'{number / 1e9:.2f} GB' if number >= 1e8 else f'{number / 1e6:.2f} MB'


def _training(lines: list[dict], images: int) -> str:
  header = ['devices', 'batch', 'memory', 'GFLOP', 'sent']
  for name in HARDWARE:
    header += [f'{name}: ms a step', 'communication', 'seconds an epoch']
  rows = []
  for line in lines:
    program = line['training']
    row = [f'{line["devices"]:,}', f'{line["batch"]:,}', _size(program['held'])]
    row += [f'{program["flops"] / 1e9:,.1f}', _sent(program)]
    for name in HARDWARE:
      on = program['on'][name]
      epoch = -(-images // line['batch']) * on['seconds']
      share = on['communication'] / on['seconds']
      row += [f'{1e3 * on["seconds"]:.2f}', f'{share:.0%}', f'{epoch:.2f}']
      if not on['fits']:
        row[-3:] = ['does not fit', '', '']
    rows.append(row)
  return _table(header, rows)


def _errors(lines: list[dict]) -> str:
  """The errors of lines whose diagnostic step does not fit; '' if there are none."""
  errors = dict.fromkeys(line['probe']['error'] for line in lines if 'error' in line['probe'])
  if not errors:
    return ''
  return 'It fits none of these:\n\n' + '\n'.join(f'- `{error}`' for error in errors)


def _probe(lines: list[dict], name: str) -> str:
  header = ['devices', 'memory', 'TFLOP', 'at highest precision', 'sent']
  header += [part for name in HARDWARE for part in (f'{name}: s', 'communication')]
  rows = []
  for line in lines:
    program = line[name]
    row = [f'{line["devices"]:,}', _size(program['held']), f'{program["flops"] / 1e12:.2f}']
    row += [f'{program["highest_flops"] / 1e12:.2f}', _sent(program)]
    for on in program['on'].values():
      share = on['communication'] / on['seconds']
      row += [f'{on["seconds"]:.3f}', f'{share:.0%}'] if on['fits'] else ['does not fit', '']
    rows.append(row)
  return _table(header, rows)


def main() -> None:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--line', help='CASE,DEVICES,BATCH')
  parser.add_argument('--case', action='append', choices=list(CASES), help='compute only this case')
  parser.add_argument('--write', action='store_true')
  options = parser.parse_args()
  if options.line:
    case, devices, batch = options.line.split(',')
    print(json.dumps(measure(case, int(devices), int(batch))))
    return
  if not options.write:
    run_all(options.case or list(CASES))
  text = PAGE.read_text()
  before, after = text.split(BEGIN)[0], text.split(END)[1]
  made = tables(json.loads(RESULTS.read_text()))
  PAGE.write_text(f'{before}{BEGIN}\n\n{made}\n\n{END}{after}')


if __name__ == '__main__':
  main()
