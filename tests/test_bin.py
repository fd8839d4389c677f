"""The binaries as a user meets them: bad input ends in one line and exit code 1."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from csba_jax.data.sources import DigitsSource
from csba_jax.errors import UserError
from csba_jax.run import restore

ROOT = Path(__file__).parents[1]


def call(binary, *arguments, cwd=ROOT, **environment):
  """(exit code, standard output, standard error) of python -m csba_jax.bin.BINARY."""
  flags = '--xla_backend_optimization_level=1'  # as conftest.py has it
  plain = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags}
  process = subprocess.run(
    [sys.executable, '-m', f'csba_jax.bin.{binary}', *arguments],
    cwd=cwd,
    env=os.environ | plain | environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr


DIGITS = f'--config={ROOT}/configs/digits_lt.py'
CIFAR = f'--config={ROOT}/configs/cifar10_lt.py'
FOLDER = f'--config={ROOT}/configs/image_folder.py'
REPORT_FLAGS = '--workdir=STUDY, --workdirs=RUN,RUN or --readme=results/README.md'
simulated = types.SimpleNamespace(**runpy.run_path(ROOT / 'tests/simulated.py'))

BAD_TRAINING = {
  'no config': ([], 'expected --config'),
  'config not there': (['--config=configs/digit_lt.py'], "found 'configs/digit_lt.py'; "),
  'recipe not there': (['--config=digitslt'], "found 'digitslt'; to fix it: use digits_lt"),
  'config not a recipe': (['--config', 'setup.cfg'], "config.json; found 'setup.cfg'"),
  'config not Python': ([], 'invalid syntax'),
  'no workdir': ([DIGITS], 'expected --workdir'),
  'unknown flag': ([DIGITS, '--wrkdir=x'], 'wrkdir'),
  'photos and a recipe': (
    [DIGITS, '--data=photos'],
    '--data, which chooses the settings, or --config; found both; to fix it: remove --config',
  ),
  'flagfile not there': (['--flagfile=/nix'], "No such file or directory: '/nix'"),
  'photos that are not there': (['--data=/nix', '--workdir=x'], 'found nothing at /nix; '),
  'photos and processes': (
    ['--data=x', '--workdir=x', '--coordinator=a:1', '--processes=2', '--process=0'],
    'expected --data with one process; found several; to fix it: run csba-audit',
  ),
  'minutes without photos': (
    [DIGITS, '--minutes=3'],
    'expected --minutes with --data; found it without; to fix it: remove --minutes',
  ),
  'stray word': ([DIGITS, 'stray'], 'expected flags only; found stray'),
  'unknown field': ([DIGITS, '--config.train.epocs=3'], 'set --config.train.epochs'),
  'wrong type': ([DIGITS, '--config.train.epochs=ten'], "'ten'"),
  'imbalance below 1': ([DIGITS, '--config.data.imbalance_factor=0.01'], '1 / 0.01 = 100'),
  'empty class': (
    [DIGITS, '--config.data.imbalance_factor=900'],
    'to fix it: set data.imbalance_factor to 125 or less',
  ),
  'large batch': ([DIGITS, '--config.train.batch_size=5000'], 'a batch larger than the data'),
  'unknown model': ([DIGITS, '--config.model.name=vgg'], "found 'vgg'"),
  'unknown attention': ([DIGITS, '--config.model.attention=se2'], 'csba_class'),
  'unknown loss': ([DIGITS, '--config.loss.name=hinge'], 'balanced_softmax'),
  'csba without branches': (
    [DIGITS, '--config.model.name=resnet32'],
    'since csba needs branches, or set --config.model.attention=none',
  ),
  'deferred past the end': (
    [DIGITS, '--config.loss.weights_start=160'],
    '0 <= share of the run < 1',
  ),
  'tau out of range': ([DIGITS, '--config.loss.tau=-1'], 'loss.tau: a finite number >= 0'),
  'beta out of range': ([DIGITS, '--config.loss.beta=1'], 'loss.beta: 0 <= beta < 1'),
  'labels that do not mix': (
    [DIGITS, '--config.loss.name=focal', '--config.mixing.name=mixup'],
    'a loss that takes mixed labels with mixing.name mixup',
  ),
  'second stage of nothing': (
    [DIGITS, '--config.stage.method=crt', '--config.stage.source=/nix'],
    'no config.json',
  ),
  'manifest of digits': (
    [DIGITS, '--config.data.manifest=m.csv'],
    'only with data.source=image_folder',
  ),
  'size not as declared': ([DIGITS, '--config.data.image_size=16'], 'data.image_size=8'),
  'no photos named': ([FOLDER], 'set --config.data.dir'),
  'folder not there': ([FOLDER, '--config.data.dir=/nix'], '/nix'),
}


# a process takes seconds
OTHERS = (
  'no config',
  'recipe not there',
  'stray word',
  'large batch',
  'csba without branches',
  'second stage of nothing',
  'folder not there',
)
# what other tests try too, without a process
ELSEWHERE = (
  'config not there',
  'config not a recipe',
  'config not Python',
  'wrong type',
  'imbalance below 1',
  'unknown model',
  'unknown attention',
  'unknown loss',
  'deferred past the end',
  'tau out of range',
  'beta out of range',
  'labels that do not mix',
  'manifest of digits',
  'size not as declared',
)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(
      c, marks=[pytest.mark.slow] * (c in ELSEWHERE) + [pytest.mark.seconds] * (c in OTHERS)
    )
    for c in BAD_TRAINING
  ],
)
def test_bad_input_ends_in_one_line(tmp_path, case):
  arguments, expected = BAD_TRAINING[case]
  if case == 'config not Python':
    (tmp_path / 'broken.py').write_text('this is no Python')
    arguments = [f'--config={tmp_path}/broken.py']
  workdir = [] if case == 'no workdir' else [f'--workdir={tmp_path / "run"}']
  code, out, err = call('train', *arguments, *workdir, CSBA_IMAGE_FOLDER='')
  assert code == 1, err
  assert 'Traceback' not in err
  assert expected in err.splitlines()[-1]
  assert err.splitlines()[-1].startswith('train.py: expected ')
  assert not out
  assert not (tmp_path / 'run').exists()  # nothing is left behind


@pytest.mark.seconds
@pytest.mark.parametrize('arguments', [['--dry_run'], ['--workdir=run']])
def test_a_device_that_is_not_here(tmp_path, arguments):
  code, out, err = call('train', DIGITS, *arguments, cwd=tmp_path, JAX_PLATFORMS='cuda')
  assert (code, out) == (1, '')
  assert err.count('\n') == 1
  assert err.startswith('train.py: expected a device for JAX (JAX_PLATFORMS=cuda); found ')
  assert not (tmp_path / 'run').exists()


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ((), 'no class folder'),
    (('cat/a.png',), 'only one, cat'),
    (('cat/a.png', 'dog/notes.txt'), 'none in dog'),
    (None, 'a file, '),
  ],
)
def test_folders_that_are_no_data(tmp_path, files, expected):
  folder = tmp_path / 'photos'
  if files is None:
    folder.write_text('')
  for name in files or ():
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('')
  if files == ():
    folder.mkdir()
  code, _, err = call('train', FOLDER, f'--config.data.dir={folder}', f'--workdir={tmp_path}/run')
  assert code == 1
  assert 'Traceback' not in err
  assert expected in err.splitlines()[-1]


@pytest.mark.seconds
def test_absent_tfds_set_names_folder_and_command(tmp_path):
  code, _, err = call('train', CIFAR, f'--config.data.dir={tmp_path}', f'--workdir={tmp_path}/run')
  assert code == 1
  last = err.splitlines()[-1]
  assert str(tmp_path) in last
  assert 'array_record' in last


@pytest.mark.parametrize(
  ('binary', 'arguments', 'expected'),
  [
    ('evaluate', [], 'expected --workdir'),
    pytest.param('evaluate', ['--workdir=nix'], 'no config.json there', marks=pytest.mark.seconds),
    ('evaluate', ['--workdir=nix', '--split=all'], "--split: test or val; found 'all'"),
    ('report', [], f'expected {REPORT_FLAGS}; found none; '),
    pytest.param(
      'report', ['--workdirs='], f'expected {REPORT_FLAGS}; found none; ', marks=pytest.mark.seconds
    ),
    pytest.param(
      'report',
      ['--workdir=a', '--workdirs=a,b'],
      'found --workdir and --workdirs; ',
      marks=pytest.mark.seconds,
    ),
    pytest.param(
      'report',
      ['--workdirs=a', '--readme=b'],
      'found --workdirs and --readme; ',
      marks=pytest.mark.seconds,
    ),
    ('audit', [], 'expected one FOLDER; found none; '),
    ('predict', ['a'], 'expected --workdir'),
    ('predict', ['/nix', '--workdir=a'], 'a photo or a folder of photos; found nothing at /nix; '),
    (
      'predict',
      ['tests', '--workdir=a', '--grad_cam=tests'],
      'a new folder for --grad_cam; found tests, which exists',
    ),
    ('predict', ['tests', '--workdir=a', '--out=x.txt'], '--out=FILE.csv or FILE.jsonl; found x'),
    pytest.param(
      'predict',
      ['setup.cfg', '--workdir=nix'],
      'no config.json there',
      marks=pytest.mark.seconds,
    ),
    ('export', ['--workdir=a'], 'expected --out; found none; '),
    ('export', ['--workdir=a', '--out=tests'], 'a new folder for --out; found tests, which exists'),
    pytest.param(
      'export',
      ['--workdir=nix', '--out=x'],
      'a finished run (csba-train ends with result.json)',
      marks=pytest.mark.seconds,
    ),
    ('audit', ['a', 'b'], 'expected one FOLDER; found a b; to fix it: name it, and write all else'),
    ('audit', ['/nix'], 'images for each class; found nothing at /nix; '),
    ('audit', ['tests/bin'], 'with one folder of images for each class; found '),
    ('audit', [''], 'expected one FOLDER; found none'),
    ('audit', ['a', '--workdir=a/b'], 'a --workdir outside the folder of photos; found a/b; '),
    ('report', ['--workdir=tests'], 'the folder of a study (csba-study) at tests; found no study'),
    pytest.param(
      'report',
      ['--readme=nix.md'],
      'a README in UTF-8 at nix.md; found No such file',
      marks=pytest.mark.seconds,
    ),
    pytest.param('evaluate', ['--workdir='], 'expected --workdir', marks=pytest.mark.seconds),
    (
      'diagnose',
      ['--workdir=nix', '--statistics=batch', '--exact', '--folds=4'],
      'expected --exact and --folds not set with --statistics=batch; found them set; to fix it: '
      'remove --exact and --folds, or change --statistics',
    ),
    (
      'diagnose',
      ['--workdir=nix', '--batches=4', '--noexact'],
      'expected --batches not set with --statistics=frozen; found it set; to fix it: remove '
      '--batches, or change --statistics',
    ),
    (
      'diagnose',
      ['--workdir=nix', '--exact', '--images=8'],
      'expected --images not set with --exact; found it set; to fix it: remove --images, or change '
      '--exact',
    ),
    pytest.param('report', ['--workdirs=nix'], 'no result.json there', marks=pytest.mark.seconds),
    pytest.param(
      'report',
      ['--workdirs=a', '--pool'],
      'expected --pool with --workdir or --readme alone; ',
      marks=pytest.mark.seconds,
    ),
    pytest.param(
      'report',
      ['--workdir=a', '--results=b'],
      'expected --results with --readme alone; found it',
      marks=pytest.mark.seconds,
    ),
  ],
)
def test_bad_input_of_the_others(binary, arguments, expected):
  code, out, err = call(binary, *arguments)
  assert (code, out) == (1, '')
  assert len(err.splitlines()) == 1
  assert expected in err


BINARIES = {
  'train': ('workdir', 'data', 'minutes', 'dry_run', 'list_fields'),
  'evaluate': ('workdir', 'checkpoint', 'split', 'data_dir', 'post_hoc_tau'),
  'diagnose': (
    *('workdir', 'checkpoint', 'exact', 'target', 'images', 'folds', 'seed', 'layers'),
    *('statistics', 'batches'),
  ),
  'study': ('workdir', 'jobs', 'shard', 'keep_runs', 'dry_run', 'list_fields'),
  'report': ('workdir', 'pool', 'workdirs', 'readme', 'results'),
  'audit': ('workdir', 'layout'),
  'export': ('workdir', 'out', 'min_confidence', 'thresholds', 'min_recall', 'field_prior'),
  'predict': (
    *('workdir', 'out', 'min_confidence', 'thresholds', 'min_recall', 'field_prior'),
    'grad_cam',
  ),
}
OPERANDS = {'audit': 'FOLDER', 'predict': 'PHOTOS'}
PROCESSES = ('distributed', 'coordinator', 'processes', 'process', 'start_timeout', 'peer_timeout')


@pytest.mark.parametrize('binary', BINARIES)
def test_help_shows_the_own_flags_and_an_example(binary, tmp_path):
  code, out, err = call(binary, '--help', cwd=tmp_path)
  assert (code, err) == (0, '')
  lines = out.splitlines()
  assert len(lines) < 40
  assert max(map(len, lines)) <= 100
  assert lines[0].startswith(f'csba-{binary} {OPERANDS.get(binary, "--")}')
  (example,) = (line for line in lines if line.startswith('Example: '))
  shown = [line.split()[0][2:].split('=')[0] for line in lines if line.startswith('  --')]
  config = ['config', 'config.FIELD'] if binary in ('train', 'study') else []
  processes = PROCESSES if binary in ('train', 'evaluate', 'diagnose') else ()
  assert {*BINARIES[binary], *processes, *config} <= set(shown)
  assert len(set(shown)) == len(shown)
  assert not {'alsologtostderr', 'verbosity', 'helpfull'} & set(shown)
  assert ('Several processes (docs/launching.md):' in lines) == bool(processes)
  assert example.startswith(f'Example: csba-{binary} ')
  used = [word[2:].split('=')[0] for word in example.split() if word.startswith('--')]
  assert all(name in shown or name.startswith('config.') for name in used)


@pytest.mark.seconds
def test_an_audit_prints_and_writes(tmp_path):
  for name, level in (('a', 0), ('<b>', 128)):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(2):
      noise = np.random.default_rng(level).integers(0, 256, (80, 80, 3), np.uint8)
      PIL.Image.fromarray(noise).save(tmp_path / 'photos' / name / f'{i}.png')
  code, out, err = call('audit', 'photos', '--workdir=runs/x', cwd=tmp_path)
  assert (code, err) == (0, '')
  lines = out.splitlines()
  assert lines[0] == 'photos: 4 photos of 2 classes'
  assert ['<b>', '2', '1'] in [line.split() for line in lines]
  assert lines[-1].endswith(
    ': --config.data.manifest=runs/x/copies.csv --config.data.group_column=group'
  )
  written = [line.split()[1] for line in lines if line.startswith('written: ')]
  assert written == [f'runs/x/{name}' for name in ('audit.json', 'copies.csv', 'audit.html')]
  page = (tmp_path / 'runs/x/audit.html').read_text()
  assert '&lt;b&gt;/0.png' in page
  assert '<b>' not in page
  assert page.count('data:image/jpeg;base64,') == 4
  (tmp_path / 'file').write_text('')
  code, out, err = call('audit', 'photos', '--workdir=file', cwd=tmp_path)
  assert (code, len(err.splitlines())) == (1, 1)
  assert 'to write audit.json, copies.csv into file; found ' in err


@pytest.mark.slow
def test_a_folder_of_photos_is_trained_on_without_a_recipe(tmp_path):
  for name, n in (('a', 24), ('b', 8)):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(n):
      noise = np.random.default_rng(i + n).integers(0, 256, (32, 32, 3), np.uint8)
      PIL.Image.fromarray(noise).save(tmp_path / 'photos' / name / f'{i}.png')
  (tmp_path / 'flags.txt').write_text('--config.train.epochs=1\n')
  command = ['--data=photos', '--workdir=run', '--config.model.width=0.05', '--flagfile=flags.txt']
  code, out, err = call('train', *command, '--dry_run', cwd=tmp_path)
  assert code == 0, err
  assert '  data.num_classes=2: its class folders' in out.splitlines()
  assert 'train.epochs=' not in out  # it is given
  assert 'parameters: ' in out
  assert not (tmp_path / 'run').exists()
  code, out, err = call('train', *command, cwd=tmp_path)
  assert code == 0, err
  assert out.splitlines()[0] == 'photos: 32 photos of 2 classes'
  assert 'macro-F1' in out
  config = json.loads((tmp_path / 'run/config.json').read_text())['config']
  assert (config['train']['epochs'], config['model']['width']) == (1, 0.05)
  assert config['data']['dir'] == str(tmp_path / 'photos')
  assert {'audit.html', 'copies.csv', 'result.json'} <= set(os.listdir(tmp_path / 'run'))
  code, out, err = call('train', *command, cwd=tmp_path)
  assert code == 0, err
  assert out.splitlines()[0].startswith('class ')
  assert 'the run of run goes on with its settings; the folder is not audited again' in err
  assert 'is finished' in err
  code, out, err = call('train', *command, '--config.train.batch_size=4', cwd=tmp_path)
  assert code == 1
  note, error = err.splitlines()
  assert 'goes on with its settings' in note
  assert 'train.batch_size' in error


@pytest.mark.slow
def test_dry_run_needs_no_data_and_counts_the_papers_parameters(tmp_path):
  for attention, low, high in (('none', 1_343_250, 1_356_750), ('csba', 1_781_050, 1_798_950)):
    code, out, err = call(
      'train', CIFAR, '--dry_run', f'--config.model.attention={attention}', TFDS_DATA_DIR='/nix'
    )
    assert code == 0, err
    (count,) = (line for line in out.splitlines() if line.startswith('parameters: '))
    assert low <= int(count.split()[1]) <= high
    assert 'stage2/block1/branch3x3/conv/kernel' in out
    assert 'GFLOP' in out
    assert 'MiB' in out
    config = json.loads(out.split('config: ')[1])
    assert config['model']['attention'] == attention
    assert config['data']['imbalance_factor'] == 100.0


@pytest.mark.slow
def test_dry_run_of_a_mesh_that_is_not_there():
  narrow = ['--dry_run', '--config.model.width=0.05', '--config.parallel.fake_devices=256']
  arguments = [DIGITS, *narrow, '--config.parallel.fsdp=2', '--config.parallel.hardware=v6e']
  flags = '--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=3'
  code, out, err = call('train', *arguments, '--config.train.batch_size=512', XLA_FLAGS=flags)
  assert code == 0, err
  lines = out.splitlines()
  assert any(line.startswith('parameters: ') for line in lines)
  assert 'mesh: 256 fake devices, 2 to a copy of the state; times for v6e' in lines
  assert 'training step: 2 of 512 images on each device' in out
  assert out.count('all-reduce, calls ') == 1
  for more, expected in (
    ('train.batch_size=500', 'train.batch_size that 256 devices divide; found 500'),
    (
      'parallel.hardware=h1000',
      'parallel.hardware: h100, h200, a100, v4, v5e, v5p or v6e; found',
    ),
    ('parallel.fake_devices=5000', 'parallel.fake_devices: 0 (none) to 4096; found 5000'),
  ):
    code, out, err = call('train', *arguments, f'--config.{more}')
    assert (code, out, len(err.splitlines())) == (1, '', 1), err
    assert expected in err


@pytest.mark.slow
def test_dry_run_of_a_folder_wants_the_number_of_classes():
  code, _, err = call('train', FOLDER, '--dry_run', CSBA_IMAGE_FOLDER='')
  assert code == 1
  assert 'set --config.data.num_classes=N' in err
  code, out, _ = call(
    'train', FOLDER, '--dry_run', '--config.data.num_classes=3', '--config.model.width=0.1'
  )
  assert code == 0
  assert 'parameters: ' in out


@pytest.fixture(scope='module')
def digits_runs(tmp_path_factory):
  """Workdirs of a very narrow net on digits, two epochs with each of two losses."""
  folder = tmp_path_factory.mktemp('runs')
  for loss in ('cross_entropy', 'focal'):
    code, out, err = call(
      'train',
      DIGITS,
      f'--workdir={folder / loss}',
      f'--config.loss.name={loss}',
      '--config.model.attention=none',
      '--config.model.width=0.05',
      '--config.train.epochs=2',
      '--config.train.eval_every=1',
    )
    assert code == 0, err
    assert f'workdir: {folder / loss}' in out
    assert 'macro-F1' in out
  return folder


@pytest.mark.seconds
def test_train_evaluate_report(digits_runs):
  code, out, err = call('evaluate', f'--workdir={digits_runs / "focal"}')
  assert code == 0, err
  macro_f1 = json.loads((digits_runs / 'focal/result.json').read_text())['macro_f1']
  assert ['macro-F1', f'{macro_f1:.3f}'] in [line.split() for line in out.splitlines()]
  assert 'rows: true class (its images), columns: predicted class' in out.splitlines()
  (picture,) = (digits_runs / 'focal').glob('confusion_test_step*.png')
  assert f'written: {picture}' in err.splitlines()
  assert picture.read_bytes().startswith(b'\x89PNG')
  code, out, err = call('report', f'--workdirs={digits_runs}/cross_entropy,{digits_runs}/focal/')
  assert code == 0, err
  lines = out.splitlines()
  assert lines[0].split() == ['F1', 'of', 'class', 'training', 'images', 'cross_entropy', 'focal']
  assert len([line for line in lines if line[:1].isdigit()]) == 10
  assert lines[-1].startswith('workdirs: ')


@pytest.mark.seconds
def test_predict_from_the_workdir_alone(digits_runs, tmp_path):
  shutil.copytree(digits_runs / 'focal', tmp_path / 'run')
  (tmp_path / 'photos').mkdir()
  digits = DigitsSource()
  for i in range(100):
    PIL.Image.fromarray(digits[i]['image'][..., 0]).save(tmp_path / f'photos/{i:03d}.png')
  command = ['photos', '--workdir=run', '--out=x.csv']
  code, out, err = call('predict', *command, cwd=tmp_path)
  assert (code, out) == (0, 'written: x.csv (100 photos)\n'), err
  assert re.match(r'temperature \d\.\d\d from \d+ validation images: their calibration', err)
  with (tmp_path / 'x.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['file'] for row in rows] == [f'photos/{i:03d}.png' for i in range(100)]
  net = restore.load_net(tmp_path / 'run')
  logits = net.logits(np.stack([digits[i]['image'] for i in range(100)]))
  assert [int(row['class']) for row in rows] == np.asarray(logits).argmax(1).tolist()
  for row in rows:
    assert sum(float(row[f'p:{c}']) for c in range(10)) == pytest.approx(1, abs=1e-5)
  code, out, err = call('predict', *command, cwd=tmp_path)
  assert (code, out, len(err.splitlines())) == (1, '', 1)
  assert 'a new file for --out; found x.csv, which exists' in err
  (tmp_path / 'photos/broken.png').write_bytes(b'')
  more = ['photos', '--workdir=run', '--thresholds=macro_f1', '--min_recall=9:0.9']
  code, out, err = call('predict', *more, '--field_prior=uniform', cwd=tmp_path)
  assert code == 1
  assert len(out.splitlines()) == 100
  assert err.splitlines()[0].endswith(', and other class shares')
  assert err.splitlines()[-1] == 'cannot be read: photos/broken.png (empty file)'
  code, out, err = call('predict', *more, '--min_recall=x:0.9', cwd=tmp_path)
  assert (code, out, len(err.splitlines())) == (1, '', 1)
  assert '--min_recall=CLASS:RECALL' in err


@pytest.mark.seconds
def test_the_page_of_a_run_and_its_export(digits_runs, tmp_path):
  shutil.copytree(digits_runs / 'focal', tmp_path / 'run')
  code, out, err = call('report', '--workdir=run', cwd=tmp_path)
  assert code == 0, err
  assert out.splitlines()[-2:] == ['workdir: run', 'written: run/report.html']
  assert 'The surest mistakes' in (tmp_path / 'run/report.html').read_text()
  code, out, err = call('report', '--workdir=run', '--pool', cwd=tmp_path)
  assert (code, out, len(err.splitlines())) == (1, '', 1)
  assert '--pool with the folder of a study; found a single run in run; to fix it: remove it' in err
  code, out, err = call(
    'export', '--workdir=run', '--out=net', '--min_confidence=0.3', cwd=tmp_path
  )
  assert (code, err) == (0, '')
  assert out.splitlines()[0] == 'written: net/README.md'
  assert json.loads((tmp_path / 'net/model.json').read_text())['min_confidence'] == 0.3
  assert (tmp_path / 'net/README.md').read_text().count('# net: images of 10 classes') == 1
  code, out, err = call('export', '--workdir=run', '--out=net', cwd=tmp_path)
  assert (code, out, len(err.splitlines())) == (1, '', 1)


@pytest.mark.seconds
def test_report_of_a_study_and_in_a_readme(tmp_path):
  simulated.study(tmp_path / 'results/one', seeds=2, variants=('none',))
  code, out, err = call('report', '--workdir=results/one', cwd=tmp_path)
  assert (code, err) == (0, '')
  assert 'Overall: CSBA makes a better tail by less conflict: undecided' in out.splitlines()
  assert (tmp_path / 'results/one/report.html').exists()
  readme = tmp_path / 'README.md'
  readme.write_text('no marks')
  code, out, err = call('report', '--readme=README.md', cwd=tmp_path)
  assert (code, out, len(err.splitlines())) == (1, '', 1)
  assert '<!-- results: made by csba-report --readme -->' in err
  assert readme.read_text() == 'no marks'
  readme.write_text('<!-- results: made by csba-report --readme --><!-- end of results -->')
  code, out, err = call('report', '--readme=README.md', '--results=results', cwd=tmp_path)
  assert (code, out, err) == (0, 'README.md updated\n', '')
  assert '[results/one/report.md](results/one/report.md)' in readme.read_text()


@pytest.mark.seconds
def test_report_refuses_runs_on_other_splits(digits_runs, tmp_path):
  result = json.loads((digits_runs / 'focal/result.json').read_text())
  shutil.copytree(digits_runs / 'focal', tmp_path / 'other')
  (tmp_path / 'other/result.json').write_text(json.dumps(result | {'splits_sha256': 'x'}))
  code, _, err = call('report', f'--workdirs={digits_runs}/focal,{tmp_path}/other')
  assert code == 1
  assert 'runs on the same splits' in err


@pytest.mark.seconds
def test_the_same_command_again_and_another_config(digits_runs):
  arguments = [DIGITS, f'--workdir={digits_runs / "focal"}', '--config.model.width=0.05']
  arguments += ['--config.train.epochs=2', '--config.train.eval_every=1']
  arguments += ['--config.loss.name=focal', '--config.model.attention=none']
  code, out, err = call('train', *arguments)
  assert code == 0
  assert 'is finished' in err
  assert 'macro-F1' in out
  code, _, err = call('train', *arguments, '--config.seed=1')
  assert code == 1
  assert 'seed: 0 there, 1 here' in err


def test_letters_that_a_terminal_cannot_show_are_escapes_in_every_binary(monkeypatch):
  from csba_jax.bin import _main

  streams = {}
  for name in ('stdout', 'stderr'):
    streams[name] = io.TextIOWrapper(io.BytesIO(), encoding='ascii', write_through=True)
    monkeypatch.setattr(sys, name, streams[name])

  def main():
    print('日本, caf\udce9')
    raise UserError('Ä', 'ö', 'ü')

  monkeypatch.setattr(sys, 'argv', ['csba-x'])
  monkeypatch.setattr(_main.app, 'run', lambda call, flags_parser: call([]))
  with pytest.raises(SystemExit) as left:
    _main.run(main)
  assert left.value.code == 1
  written = {name: stream.buffer.getvalue().decode('ascii') for name, stream in streams.items()}
  assert written['stdout'] == '\\u65e5\\u672c, caf\\udce9\n'
  assert written['stderr'] == 'csba-x: expected \\xc4; found \\xf6; to fix it: \\xfc\n'
