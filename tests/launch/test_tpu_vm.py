"""launch/tpu_vm.sh with a gcloud that records its calls, and folders as hosts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The state of the VM is a file; scp copies into the folder of each host; ssh runs there for real.
GCLOUD = """\
#!/usr/bin/env bash
set -u
echo "$*" | tr '\\n' ' ' >>"$STUB/calls"; echo >>"$STUB/calls"
next() { local line; line=$(head -n 1 "$STUB/$1"); sed -i 1d "$STUB/$1"; echo "$line"; }
case "$1 $2 $3 $4" in
  'compute tpus tpu-vm list')
    [ ! -e "$STUB/blind" ] || exit 1
    [ ! -s "$STUB/states" ] || next states >"$STUB/state"
    [ ! -e "$STUB/state" ] || cat "$STUB/state" ;;
  'compute tpus tpu-vm create')
    [ "$(next creations)" != none ] || exit 1
    echo READY >"$STUB/state"; exit "$(cat "$STUB/create_code")" ;;
  'compute tpus tpu-vm start') echo READY >"$STUB/state" ;;
  'compute tpus tpu-vm delete') [ ! -e "$STUB/undeletable" ] || exit 1; rm "$STUB/state" ;;
  'compute tpus tpu-vm scp') for host in "$STUB"/host*; do cp "$5" "$6" "$host"; done ;;
  'compute tpus tpu-vm ssh')
    for argument; do case $argument in --command=*) command=${argument#*=} ;; esac; done
    [ "$command" != 'bash csba.sh' ] || code=$(next codes)
    if [ "${code:-}" = blind ]; then touch "$STUB/blind"; exit 1; fi
    if [ "${code:-}" = lost ]; then echo PREEMPTED >"$STUB/state"; exit 255; fi
    first=0
    for host in "$STUB"/host*; do
      (cd "$host"; HOME=$host CODE=${code:-} bash -c "$command")
      last=$?
      [ $first != 0 ] || first=$last
    done
    exit $first ;;
  storage*) mkdir -p "$5" ;;
  *) exit 64 ;;
esac
"""
# What a host has. uv makes the program: it notes how it was called and ends as it was told to.
HOST = {
  'mountpoint': 'exit 1',
  'sudo': '"$@"',
  'gcsfuse': 'echo "$*" >>"$HOME/mounts"',
  'pkill': 'echo "pkill $*" >>"$STUB/signals"; [ ! -e "$STUB/waiting" ] || touch "$STUB/stopped"',
  'pgrep': 'exit 1',
  'python3': '[ "$*" != "-m site --user-base" ] || echo "$HOME/.local"; '
  'mkdir -p "$HOME/.local/bin"; cp "$STUB/uv" "$HOME/.local/bin/uv"',
}
UV = """\
#!/bin/sh
mkdir -p "$HOME/venv/bin"
for name in csba-train csba-study; do cp "$STUB/program" "$HOME/venv/bin/$name"; done
"""
PROGRAM = """\
#!/bin/sh
printf '%s\\n' "$@" >"$HOME/arguments"
echo "data: $TFDS_DATA_DIR, code: $(cat code)"
if [ "$CODE" = wait ]; then
  touch "$STUB/waiting"
  for i in $(seq 300); do [ -e "$STUB/stopped" ] && exit 75; sleep 0.1; done
  exit 3
fi
exit "$CODE"
"""
SETTINGS = {'NAME': 'run', 'ZONE': 'zone-a', 'TPU': 'v5litepod-16', 'BUCKET': 'bucket'}


class Cloud:
  """A folder in which launch/tpu_vm.sh runs, and what it did there."""

  def __init__(self, folder):
    self.folder = folder
    self.repository, self.stub = folder / 'repository', folder / 'stub'
    (self.repository / 'launch').mkdir(parents=True)
    shutil.copy(ROOT / 'launch/tpu_vm.sh', self.repository / 'launch')
    (self.repository / 'code').write_text('committed')
    git = ['git', '-C', str(self.repository), '-c', 'user.name=x', '-c', 'user.email=x@x']
    for command in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'x']):
      subprocess.run([*git, *command], check=True)
    (self.repository / 'code').write_text('changed')
    for host in ('host0', 'host1'):
      (self.stub / host).mkdir(parents=True)
    (self.stub / 'create_code').write_text('0')
    self._write(self.stub / 'bin/gcloud', GCLOUD)
    for name, body in HOST.items():
      self._write(self.stub / 'bin' / name, f'#!/bin/sh\n{body}\n')
    self._write(self.stub / 'uv', UV)
    self._write(self.stub / 'program', PROGRAM)

  def _write(self, path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def start(self, *arguments, codes=('0',), creations=(), states=(), **settings):
    """The script as a process.

    Each start of the program takes the next exit code, each creation of a VM says whether there is
    `none` to be had, and each look at its state finds the next.
    """
    lists = {'codes': codes, 'creations': creations, 'states': states}
    for name, lines in lists.items():
      (self.stub / name).write_text(''.join(f'{line}\n' for line in lines))
    settings = SETTINGS | settings
    return subprocess.Popen(
      ['bash', str(self.repository / 'launch/tpu_vm.sh'), *(arguments or ['csba-train'])],
      cwd=self.folder,
      env={
        'PATH': f'{self.stub}/bin:{os.environ["PATH"]}',
        'HOME': str(self.folder),
        'STUB': str(self.stub),
        'MOUNT': str(self.folder / 'mount'),
        'PAUSE': '0',
        **{name: value for name, value in settings.items() if value is not None},
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments, **options):
    """(exit code, standard output, standard error)."""
    process = self.start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  def calls(self):
    """Calls of gcloud, as lists of words."""
    path = self.stub / 'calls'
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self):
    """The calls of gcloud, without those that read the state."""
    verbs = [words[1] if words[0] == 'storage' else words[3] for words in self.calls()]
    return [verb for verb in verbs if verb != 'list']

  def options(self, verb):
    """The words of the first call of this kind."""
    return next(words for words in self.calls() if verb in words)


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def test_creates_installs_runs_deletes_and_collects(cloud):
  code, out, err = cloud.run('csba-train', '--config=a b.py', "--config.data.dir=it's")
  assert code == 0, err
  assert cloud.verbs() == ['create', 'scp', 'ssh', 'delete', 'rsync']
  create = cloud.options('create')
  assert create[4:6] == ['run', '--zone=zone-a']
  assert {'--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite'} < set(create)
  assert '--spot' not in create
  assert '--worker=all' in cloud.options('scp')
  assert '--worker=all' in cloud.options('ssh')
  assert '--quiet' in cloud.options('delete')
  assert cloud.options('rsync')[-2:] == ['gs://bucket/run', 'runs/run']
  for host in ('host0', 'host1'):
    folder = cloud.stub / host
    assert (folder / 'arguments').read_text().splitlines() == [
      '--distributed=on',
      '--start_timeout=900',
      '--config=a b.py',
      "--config.data.dir=it's",
      f'--workdir={cloud.folder}/mount/run',
    ]
    assert (folder / 'mounts').read_text().endswith(f' bucket {cloud.folder}/mount\n')
  hostname = os.uname().nodename
  assert out.count(f'{hostname}: data: {cloud.folder}/mount/tfds, code: committed\n') == 2


@pytest.mark.parametrize(
  ('tpu', 'image'),
  [('v4-8', 'tpu-ubuntu2204-base'), ('v5p-8', 'v2-alpha-tpuv5'), ('v6e-8', 'v2-alpha-tpuv6e')],
)
def test_the_image_follows_the_accelerator(cloud, tpu, image):
  assert cloud.run(TPU=tpu, SPOT='1')[0] == 0
  assert {f'--version={image}', '--spot'} < set(cloud.options('create'))


def test_a_study_is_not_distributed(cloud):
  assert cloud.run('csba-study', '--jobs=1')[0] == 0
  arguments = (cloud.stub / 'host0/arguments').read_text().split()
  assert arguments == ['--jobs=1', f'--workdir={cloud.folder}/mount/run']


@pytest.mark.parametrize('left', [True, False])
def test_a_failed_creation_leaves_nothing(cloud, left):
  (cloud.stub / 'create_code').write_text('1')
  if not left:
    gcloud = cloud.stub / 'bin/gcloud'
    gcloud.write_text(gcloud.read_text().replace('echo READY', 'false'))
  code, _, _ = cloud.run()
  assert code == 1
  assert cloud.verbs() == (['create', 'delete'] if left else ['create'])
  assert not (cloud.stub / 'state').exists() or not (cloud.stub / 'state').read_text()


def test_bad_input_is_not_tried_again(cloud):
  code, _, _ = cloud.run(codes=['1'])
  assert code == 1
  assert cloud.verbs() == ['create', 'scp', 'ssh', 'delete', 'rsync']


def test_a_stopped_program_is_started_again_on_the_same_vm(cloud):
  code, _, err = cloud.run(codes=['75', '134', '255', '0'])
  assert code == 0, err
  assert cloud.verbs() == ['create', *['scp', 'ssh'] * 4, 'delete', 'rsync']
  assert err.count('exit 75') == err.count('exit 134') == err.count('exit 255') == 1


def test_a_vm_that_was_taken_away_is_created_anew(cloud):
  code, _, err = cloud.run(codes=['lost', '0'], SPOT='1')
  assert code == 0, err
  again = ['delete', 'create', 'scp', 'ssh']
  assert cloud.verbs() == ['create', 'scp', 'ssh', *again, 'delete', 'rsync']


def test_a_creation_that_finds_no_capacity_afterwards_is_one_of_the_tries(cloud):
  creations = ['made', 'none', 'none', 'made']
  code, _, err = cloud.run(codes=['lost', '0'], creations=creations, SPOT='1')
  assert code == 0, err
  again = ['delete', 'create', 'create', 'create', 'scp', 'ssh']
  assert cloud.verbs() == ['create', 'scp', 'ssh', *again, 'delete', 'rsync']
  assert err.count('no VM available, exit 1') == 2


def test_creations_without_capacity_have_a_limit(cloud):
  code, _, err = cloud.run(codes=['lost'], creations=['made', 'none', 'none'], TRIES='3')
  assert code == 1, err
  again = ['delete', 'create', 'create']
  assert cloud.verbs() == ['create', 'scp', 'ssh', *again, 'rsync']  # what it had saved


def test_a_signal_while_it_waits_for_capacity_is_heard(cloud):
  process = cloud.start(codes=['lost'], creations=['made', *['none'] * 9], PAUSE='600')
  end = time.monotonic() + 60
  while 'no VM' not in process.stderr.readline():
    assert time.monotonic() < end
  time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 143


@pytest.mark.parametrize(
  ('states', 'expected'),
  [
    (['CREATING'] * 3 + ['READY'] * 2, []),
    (['RESTARTING', 'STARTING', 'READY', 'READY'], []),
    (['STOPPED', 'STOPPED', 'READY'], ['start']),
    (['STOPPING', 'STOPPING', 'STOPPED', 'READY'], ['start']),
    (['TERMINATED', 'TERMINATED'], ['delete', 'create']),
    (['PREEMPTED', 'PREEMPTED'], ['delete', 'create']),
  ],
)
def test_a_kept_vm_is_waited_for_or_started_unless_it_was_taken_away(cloud, states, expected):
  code, _, err = cloud.run(states=states, KEEP='1')
  assert code == 0, err
  assert cloud.verbs() == [*expected, 'scp', 'ssh', 'rsync']


def test_a_vm_that_never_is_ready_has_a_limit(cloud):
  code, _, err = cloud.run(states=['REPAIRING'] * 90, KEEP='1', TRIES='2')
  assert code == 1
  assert err.count('run is REPAIRING') == 60
  assert cloud.verbs() == ['rsync']


def test_starts_have_a_limit(cloud):
  code, _, _ = cloud.run(codes=['75'] * 5, TRIES='2')
  assert code == 75
  assert cloud.verbs() == ['create', *['scp', 'ssh'] * 2, 'delete', 'rsync']


def test_keep_leaves_the_vm_and_uses_it_again(cloud):
  code, _, err = cloud.run(codes=['1'], KEEP='1')
  assert code == 1
  assert 'run is kept, and billed until you delete it' in err
  assert cloud.run(KEEP='1')[0] == 0
  assert cloud.verbs() == ['create', 'scp', 'ssh', 'rsync', 'scp', 'ssh', 'rsync']
  assert cloud.run(KEEP='0')[0] == 1, 'a VM that is there is not taken, nor deleted'
  assert 'delete' not in cloud.verbs()


def test_somebody_elses_vm_is_left_alone(cloud):
  (cloud.stub / 'state').write_text('READY\n')
  code, _, err = cloud.run()
  assert code == 1
  assert len(err.splitlines()) == 1
  assert 'expected no TPU VM named run, got one: delete it, name another, or' in err
  assert cloud.verbs() == []


def test_a_vm_that_cannot_be_deleted_is_an_error(cloud):
  (cloud.stub / 'undeletable').touch()
  code, _, err = cloud.run()
  assert code == 1
  assert 'run COULD NOT BE DELETED, and is billed' in err


def test_a_vm_whose_state_is_not_known_is_deleted(cloud):
  code, _, _ = cloud.run(codes=['blind'])
  assert code == 1
  assert cloud.verbs() == ['create', 'scp', 'ssh', 'delete']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_run_and_deletes_the_vm(cloud, number):
  ours = signal.signal(number, signal.SIG_DFL)  # nohup's SIG_IGN no shell could undo
  process = cloud.start(codes=['wait'])
  signal.signal(number, ours)
  end = time.monotonic() + 60
  while not (cloud.stub / 'waiting').exists():
    assert time.monotonic() < end
    time.sleep(0.05)
  process.send_signal(number)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 128 + number
  assert 'stopping: the run saves its state' in err
  assert (cloud.stub / 'stopped').exists()
  assert (cloud.stub / 'signals').read_text() == 'pkill -TERM -x csba-train\n' * 4  # start, stop
  assert cloud.verbs() == ['create', 'scp', 'ssh', 'ssh', 'delete']


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    *(({name: None}, f'expected ${name}, got none: set it to a') for name in SETTINGS),
    ({'NAME': 'Run_1'}, 'expected small letters, digits and -, got Run_1'),
  ],
)
def test_what_is_missing_is_said_in_one_line(cloud, settings, words):
  code, out, err = cloud.run(**settings)
  assert (code, out) == (1, '')
  assert len(err.splitlines()) == 1
  assert words in err
  assert cloud.calls() == []


def test_a_command_is_needed(cloud):
  process = subprocess.run(
    ['bash', str(ROOT / 'launch/tpu_vm.sh')],
    env=SETTINGS | {'PATH': f'{cloud.stub}/bin:{os.environ["PATH"]}', 'STUB': str(cloud.stub)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 1
  assert 'expected a command, got none' in process.stderr
  assert cloud.calls() == []
