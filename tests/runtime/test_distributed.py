"""Several processes of one run: how they connect, what ends all of them, and a lost one."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from csba_jax.errors import UserError
from csba_jax.runtime import distributed
from csba_jax.runtime.distributed import AgreedError, Launch

PEER_TIMEOUT = 10
BOUND = 2 * PEER_TIMEOUT  # seconds; as docs/launching.md says
COORDINATOR = {'coordinator': 'host:1234', 'processes': 2, 'process': 0}
VARIABLES = [
  'SLURM_NTASKS',
  'SLURM_STEP_NODELIST',
  'OMPI_COMM_WORLD_SIZE',
  'OMPI_MCA_orte_hnp_uri',
  'TPU_WORKER_HOSTNAMES',
  'TPU_PROCESS_ADDRESSES',
  'MEGASCALE_NUM_SLICES',
]


def ends(children, seconds=150):
  """(exit code, standard error) of each child; all must end within so many seconds."""
  deadline, late = time.monotonic() + seconds, []

  def end(child):
    try:
      _, err = child.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      late.append(child)
      child.kill()
      _, err = child.communicate()
    return child.returncode, err

  with futures.ThreadPoolExecutor(len(children)) as pool:  # a child whose pipe is full would wait
    found = list(pool.map(end, children))
  assert not late, f'{len(late)} of {len(found)} not ended after {seconds} s: {found}'
  return found


def lines_of(children, seconds=150):
  """The last line of each child, which must exit with code 1 and one line of its own."""
  lines = []
  for code, err in ends(children, seconds):
    assert code == 1, err
    assert 'Traceback' not in err
    assert err.count('driver.py: ') == 1
    lines.append(err.strip().splitlines()[-1])
    assert lines[-1].startswith('driver.py: expected ')
  return lines


@contextlib.contextmanager
def a_taken_port():
  """A port of this machine on which another program listens and never answers."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    yield server.getsockname()[1]


def free_port():
  with a_taken_port() as port:
    return port


@pytest.mark.parametrize(
  ('launch', 'message'),
  [
    ({'coordinator': 'host:1234'}, "--process together; found coordinator 'host:1234', processes"),
    ({'processes': 2, 'process': 0}, "found coordinator '', processes 2, process 0; .* all three"),
    (COORDINATOR | {'process': -1}, 'process -1; to fix it: set all three'),
    (COORDINATOR | {'processes': 0}, 'processes 0, process 0; to fix it: set all three'),
    (COORDINATOR | {'process': 2}, '--process from 0 to 1; found 2; to fix it: number from 0'),
    (COORDINATOR | {'mode': 'off'}, '--distributed=auto with --coordinator; found off'),
    ({'start_timeout': 0}, '--start_timeout of at least 1 second; found 0; to fix it: set it'),
    ({'peer_timeout': -1}, '--peer_timeout of at least 1 second; found -1'),
  ],
)
def test_flags_that_do_not_go_together(launch, message):
  with pytest.raises(UserError, match=message):
    Launch(**launch).check()
  with pytest.raises(UserError, match=message):
    distributed.start(Launch(**launch), pytest.fail)


@pytest.mark.parametrize(
  'address', ['host', 'host:', ':', ':1234', '1234', 'host:0', 'host:65536', 'host:-1', 'host:²']
)
def test_an_address_without_host_or_port(address):
  with pytest.raises(UserError, match='from 1 to 65535; found .* set it to the address'):
    Launch(**COORDINATOR | {'coordinator': address}).check()


@pytest.mark.parametrize('address', ['host:1', '10.0.0.1:65535', '[::1]:8476', 'a.b.c:12345'])
def test_an_address_with_both(address):
  Launch(**COORDINATOR | {'coordinator': address}).check()


@pytest.mark.parametrize(
  ('variables', 'several'),
  [
    ({}, False),
    ({'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'n'}, True),
    ({'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'n'}, False),
    ({'SLURM_NTASKS': '2'}, False),  # a batch script: no step, one process
    ({'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:2'}, True),
    ({'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:2'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, False),  # not Open MPI 4: JAX would find nobody
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_PROCESS_ADDRESSES': 'a:8471,b:8471'}, True),
    ({'TPU_PROCESS_ADDRESSES': 'local'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '1'}, False),
    ({'MEGASCALE_NUM_SLICES': ''}, False),
  ],
)
def test_what_auto_sees_in_the_environment(monkeypatch, variables, several):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert Launch().several is several
  assert Launch(mode='on').several
  assert not Launch(mode='off').several
  assert Launch(**COORDINATOR).several
  assert not Launch(**COORDINATOR | {'processes': 1}).several


SLURM = {  # of a task of srun, on the second of two nodes
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[3-4]',
  'SLURM_NODEID': '1',
}
PER_NODE = {1: '1(x2)', 2: '1,2', 4: '8,4'}
OMPI = {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:2', 'OMPI_COMM_WORLD_RANK': '1'}
WHAT_JAX_SEES = """
import sys, types
import jax
from jax._src import distributed as jax_distributed, xla_bridge
from csba_jax.runtime import distributed
jax_distributed._jax.get_distributed_runtime_client = lambda *args, **kwargs: types.SimpleNamespace(
  connect=lambda: None, shutdown=lambda: None
)
distributed._watch_the_others = lambda: None
distributed.start(distributed.Launch(), print)
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""


@pytest.mark.parametrize(
  ('tasks', 'local', 'variables', 'sees'),
  [
    (1, 0, {}, 'all'),  # --ntasks-per-node=1 --gpus-per-node=8
    pytest.param(1, 0, {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, 'all', marks=pytest.mark.seconds),
    (4, 1, {}, '1'),  # all see all: one for each
    pytest.param(4, 1, {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, '1', marks=pytest.mark.seconds),
    (4, 1, {'CUDA_VISIBLE_DEVICES': '0'}, 'all'),  # --gpus-per-task=1: each has its own
    pytest.param(
      2,
      1,
      {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'},
      'all',
      marks=pytest.mark.seconds,
    ),
    pytest.param(
      2,
      1,
      {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_TRES_PER_TASK': 'cpu=2,gres/gpu=2'},
      'all',
      marks=pytest.mark.seconds,
    ),
    pytest.param(
      2,
      1,
      {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_TRES_PER_TASK': 'cpu=2'},
      '1',
      marks=pytest.mark.seconds,
    ),
    (1, 0, {'JAX_LOCAL_DEVICE_IDS': '2,3'}, '2,3'),
  ],
)
@pytest.mark.parametrize('launcher', ['srun', pytest.param('mpirun', marks=pytest.mark.seconds)])
def test_the_gpus_that_a_task_uses(launcher, tasks, local, variables, sees):
  if launcher == 'srun':
    own = SLURM | {'SLURM_NTASKS': '12', 'SLURM_PROCID': '1', 'SLURM_LOCALID': str(local)}
    own['SLURM_STEP_TASKS_PER_NODE'] = PER_NODE[tasks]
  else:
    own = OMPI | {'OMPI_COMM_WORLD_SIZE': '12', 'OMPI_COMM_WORLD_LOCAL_RANK': str(local)}
    own['OMPI_COMM_WORLD_LOCAL_SIZE'] = str(tasks)
  clean = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('SLURM_', 'OMPI_', 'CUDA_', 'ROCR_'))
  }
  found = subprocess.run(
    [sys.executable, '-c', WHAT_JAX_SEES],
    env=clean | own | variables | {'JAX_ENABLE_PREEMPTION_SERVICE': 'false'},
    capture_output=True,
    text=True,
  )
  assert found.stdout.strip() == sees, found.stderr


@pytest.mark.slow
def test_the_address_that_a_launcher_gave_is_named():
  """Nobody answers there."""
  own = SLURM | {'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0'}
  own |= {'SLURM_STEP_NODELIST': 'localhost', 'JAX_COORDINATOR_PORT': str(free_port())}
  program = (
    'import os, jax\n'
    'from csba_jax.runtime import distributed\n'
    'give_up = lambda error: print(error, flush=True) or os._exit(1)\n'
    'distributed.start(distributed.Launch(start_timeout=2), give_up)\n'
  )
  found = subprocess.run(
    [sys.executable, '-c', program], env=os.environ | own, capture_output=True, text=True
  )
  address = f'localhost:{own["JAX_COORDINATOR_PORT"]}'
  assert f'all processes connected to {address} within 2 seconds' in found.stdout


def test_a_single_process_meets_nobody(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  distributed.start(Launch(), pytest.fail)
  assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)
  assert distributed.gather('a') == ['a']
  assert distributed.together(lambda: 5) == 5
  with pytest.raises(UserError, match='expected a'):
    distributed.together(lambda: (_ for _ in ()).throw(UserError('a', 'b', 'c')))


def fail(error):
  raise error


def test_an_error_of_one_is_an_error_of_all(monkeypatch):
  """In the view of each of two processes; their messages are made up."""
  said = []

  def gather(text):
    said.append(text)
    return [text, 'the disk is gone']

  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'gather', gather)
  with pytest.raises(AgreedError, match='found process 1: the disk is gone; to fix it: correct it'):
    distributed.together(lambda: 5)
  with pytest.raises(AgreedError, match='expected a; found b; to fix it: c'):
    distributed.together(lambda: fail(UserError('a', 'b', 'c')))
  assert said == ['', 'expected a; found b; to fix it: c']
  with pytest.raises(AgreedError, match='expected a'):  # the others have ended: nothing is sent
    distributed.together(lambda: fail(AgreedError('a', 'b', 'c')))
  assert len(said) == 2


@pytest.mark.seconds
def test_configs_that_disagree_end_all_with_the_field(driver, tmp_path):
  workdir = tmp_path / 'run'
  children = driver.start_all(workdir, own={1: ['--config.train.momentum=0.5']})
  for line in lines_of(children):
    assert 'the same config in all processes; found ' in line
    assert 'train.momentum: 0.9 in process 0, 0.5 in process 1' in line
  assert not workdir.exists()


ENDS = """
import atexit, sys, time
from csba_jax.bin import _main
from csba_jax.runtime import backend, distributed, jax_setup

address, process, how = sys.argv[1:]
sys.argv[1:] = []

def main():
  jax_setup.prepare()
  distributed.start(distributed.Launch('on', address, 2, int(process)), print)
  backend.start()
  atexit.register(time.sleep, 1000)
  if how == 'error':
    distributed.check_equal('letters', {'a': process})
  print(*distributed.gather('process ' + process), sep=', ')
  return 75

_main.run(main)
"""


@pytest.mark.seconds
@pytest.mark.parametrize('how', ['error', 'result', 'result without room'])
def test_two_end_even_if_python_would_not(how, tmp_path, monkeypatch):
  """JAX has been seen to wait for ever at an end of Python; here an exit function does."""
  address = f'127.0.0.1:{free_port()}'
  monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[2]))
  with contextlib.ExitStack() as stack:
    out = stack.enter_context(open('/dev/full', 'w')) if 'room' in how else None
    children = [
      subprocess.Popen(
        [sys.executable, '-c', ENDS, address, str(process), how],
        stdout=out or stack.enter_context((tmp_path / f'out{process}').open('w')),
        stderr=subprocess.PIPE,
        text=True,
      )
      for process in range(2)
    ]
    found = ends(children, 60)
  codes, errors = zip(*found, strict=True)
  assert codes == {'error': (1, 1), 'result': (75, 75)}.get(how, (1, 1))
  words = {'error': "a: '0' in process 0, '1' in process 1", 'result': ''}
  assert all(words.get(how, 'standard output with room') in error for error in errors)
  assert 'Traceback' not in ''.join(errors)
  if how == 'result':
    for process in range(2):
      assert (tmp_path / f'out{process}').read_text().endswith('process 0, process 1\n')


@pytest.mark.slow
def test_a_batch_that_the_devices_do_not_divide_ends_all(driver, tmp_path):
  for line in lines_of(driver.start_all(tmp_path, '--config.train.batch_size=20')):
    assert 'train.batch_size that 8 devices divide; found 20' in line
    assert '--config.train.batch_size=16' in line
  assert not (tmp_path / 'config.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('role', [0, 1])
def test_one_that_waits_for_the_others_in_vain(driver, tmp_path, role):
  address = f'127.0.0.1:{free_port()}'
  options = [f'--coordinator={address}', '--processes=2', f'--process={role}', '--start_timeout=5']
  began = time.monotonic()
  [line] = lines_of([driver.start(tmp_path / 'run', *options)])
  assert 5 < time.monotonic() - began < 40  # Python and JAX start first
  assert f'2 processes connected to {address} within 5 seconds; found not all of them' in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_port_that_something_else_has(driver, tmp_path):
  with a_taken_port() as port:
    options = [f'--coordinator=127.0.0.1:{port}', '--processes=2', '--start_timeout=5']
    children = [driver.start(tmp_path / 'run', *options, f'--process={i}') for i in range(2)]
    first, second = lines_of(children)
  assert f'a port on which process 0 can listen; found {port}: Address already in use' in first
  assert f'2 processes connected to 127.0.0.1:{port} within 5 seconds' in second
  assert not (tmp_path / 'run').exists()


def start_each(driver, workdirs, *arguments, **of_each):
  """Starts one run, a process for each workdir; `of_each` {argument of driver.start: values}."""
  address = f'127.0.0.1:{free_port()}'
  options = [*arguments, f'--coordinator={address}', f'--processes={len(workdirs)}']
  options += ['--config.parallel.devices=0']
  return [
    driver.start(
      workdir,
      *options,
      f'--process={i}',
      devices=4,
      **{name: values[i] for name, values in of_each.items()},
    )
    for i, workdir in enumerate(workdirs)
  ]


@pytest.mark.slow
@pytest.mark.parametrize('found', ['nothing', 'a folder', 'a lock of another run'])
def test_a_workdir_that_is_not_shared(driver, tmp_path, found):
  workdirs = [tmp_path / 'a/run', tmp_path / 'b/run']
  if found != 'nothing':
    workdirs[1].mkdir(parents=True)
  if found == 'a lock of another run':
    (workdirs[1] / '.lock').write_text('0123456789abcdef')
  for line in lines_of(start_each(driver, workdirs)):
    assert 'a --workdir that all processes share' in line
    assert f'what the first one wrote to {workdirs[1]}' in line
    assert 'name a folder of a file system that every host has mounted' in line
  assert not workdirs[0].exists()  # the first one has made it, and has begun nothing in it
  assert not workdirs[1].exists() or os.listdir(workdirs[1]) in ([], ['.lock'])


def photos_in(folder, seed=0):
  """120 images of 3 classes in folder/photos."""
  rng = np.random.default_rng(seed)
  for name in 'abc':
    (folder / 'photos' / name).mkdir(parents=True)
    for i in range(40):
      image = PIL.Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
      image.save(folder / 'photos' / name / f'{i}.png')


def start_with_photos(driver, tmp_path):
  """Starts two processes, each with the photos in the folder of its index."""
  options = ['source="image_folder"', 'dir="photos"', 'image_size=8', 'num_classes=3', 'channels=3']
  return start_each(
    driver,
    [tmp_path / 'run'] * 2,
    '--config.train.batch_size=8',
    *[f'--config.data.{option}' for option in options],
    cwd=[tmp_path / '0', tmp_path / '1'],
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('change', 'words'),
  [('names', 'found names and labels: .*pixels: .*splits: '), ('pixels', 'found pixels: ')],
)
def test_data_that_is_not_the_same_in_all_processes(driver, tmp_path, change, words):
  for i in range(2):
    photos_in(tmp_path / str(i), seed=i if change == 'pixels' else 0)
  if change == 'names':
    (tmp_path / '1/photos/a/7.png').unlink()
  for line in lines_of(start_with_photos(driver, tmp_path)):
    assert 'expected the same data in all processes; ' in line
    assert ' in process 1' in line
    assert re.search(words, line)
    assert 'give every host the same files' in line
  assert not (tmp_path / 'run/config.json').exists()
  assert not (tmp_path / 'run/splits.npz').exists()


@pytest.mark.slow
@pytest.mark.parametrize('having', [0, 1])
def test_data_that_one_process_alone_has(driver, tmp_path, having):
  (tmp_path / '0').mkdir(), (tmp_path / '1').mkdir()
  photos_in(tmp_path / str(having))
  lines = lines_of(start_with_photos(driver, tmp_path))
  assert 'photos' in lines[1 - having]
  assert 'found process' not in lines[1 - having]
  assert f'no error in any process; found process {1 - having}: expected ' in lines[having]
  assert 'photos' in lines[having]
  assert not (tmp_path / 'run/config.json').exists()  # the folder is still free


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('name', 'expected'), [('TERM', 75), pytest.param('INT', 130, marks=pytest.mark.slow)]
)
def test_a_signal_while_data_is_loaded_is_answered_at_once(driver, tmp_path, name, expected):
  workdir = tmp_path / 'run'
  code, _, err = driver.finish(driver.start(workdir, '--end=before-load:1', f'--signal={name}'))
  assert code == expected, err
  assert err == 'loading digits\n'
  assert os.listdir(workdir) == ['.lock']
  code, _, err = driver.finish(driver.start(workdir))
  assert code == 0, err


@pytest.mark.slow
def test_sigterm_while_several_load_leaves_before_the_first_step(driver, tmp_path):
  own = {1: ['--end=before-load:1', '--signal=TERM']}
  (code, first), (other_code, second) = ends(driver.start_all(tmp_path / 'run', own=own))
  assert code == other_code == 75, first + second
  assert 'stopped before the first step: start again to begin' in first
  assert 'compiling' not in first


@pytest.mark.slow
@pytest.mark.parametrize(
  ('failing', 'place'),
  [(0, 'after-step:15'), (1, 'after-step:15'), (1, 'before-evaluation:1'), (0, 'before-save:2')],
)
def test_an_error_of_one_on_the_way_ends_all_with_its_line(driver, tmp_path, failing, place):
  """It does not count as a lost process, after which launchers restart all of them."""
  own = {failing: [f'--end={place}', '--signal=none']}
  lines = lines_of(driver.start_all(tmp_path, f'--peer_timeout={PEER_TIMEOUT}', own=own))
  own_line = 'expected a disk; found none; to fix it: buy one'
  assert lines[failing] == f'driver.py: {own_line}'
  assert lines[1 - failing] == (
    f'driver.py: expected no error in any process; found process {failing}: {own_line};'
    ' to fix it: correct it there'
  )


@pytest.mark.slow
def test_an_error_that_all_have_ends_each_with_its_own(driver, tmp_path):
  children = driver.start_all(tmp_path, '--end=after-step:15', '--signal=none')
  for line in lines_of(children):
    assert 'found none; to fix it: buy one' in line


def wait_until_lost(child, seconds=150):
  """Waits until a child has died or was stopped, without reaping it."""
  deadline = time.monotonic() + seconds
  how = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
  while os.waitid(os.P_PID, child.pid, how) is None:
    assert time.monotonic() < deadline
    time.sleep(0.02)


# What the other process says: heartbeats name the lost task, a broken collective does not.
BROKEN = r'|another process of the run is lost'
SAID = {
  0: r'CoordinationService/\w+|coordination service' + BROKEN,
  1: r'tasks are unhealthy \(stopped sending heartbeats\):\s+1\s' + BROKEN,
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('lost', 'name', 'place'),
  [
    (0, 'KILL', 'after-step:15'),
    (1, 'KILL', 'after-step:15'),
    (0, 'STOP', 'after-step:15'),
    (1, 'STOP', 'after-step:15'),
    (0, 'KILL', 'saving:1'),
    (1, 'KILL', 'saving:1'),
    (1, 'STOP', 'before-evaluation:1'),
  ],
)
def test_the_others_end_when_one_is_lost(driver, tmp_path, lost, name, place):
  end = [f'--end={place}', f'--signal={name}']
  children = driver.start_all(tmp_path, f'--peer_timeout={PEER_TIMEOUT}', own={lost: end})
  try:
    wait_until_lost(children[lost])
    began = time.monotonic()
    [(code, err)] = ends([children[1 - lost]], BOUND)
    print(f'{lost} {name} {place}: ended after {time.monotonic() - began:.1f} s')
    assert code == -signal.SIGABRT, err
    assert re.search(SAID[lost], err), err
    if name == 'STOP':  # it comes back: the other is gone
      children[lost].send_signal(signal.SIGCONT)
      [(code, err)] = ends([children[lost]], BOUND)
      assert code == -signal.SIGABRT, err
      # Python read no other thread's stack, which may be gone while it reads (then: SIGSEGV).
      assert 'Fatal Python error: Aborted' in err, err
      assert 'Thread 0x' not in err, err
  finally:
    for child in children:
      child.kill()
      child.communicate()


@pytest.fixture(scope='module')
def finished(driver, tmp_path_factory):
  """Workdir of an undisturbed run of two processes."""
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  for code, err in ends(driver.start_all(workdir), 240):
    assert code == 0, err
  return workdir


def steps_of(workdir):
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bit_that_flipped_in_a_checkpoint_of_two(driver, finished, tmp_path):
  workdir, often = (
    tmp_path / 'run',
    '--config.train.save_every=6',
  )  # a save waits for the one before
  for code, err in ends(driver.start_all(workdir, often, '--end=after-step:30'), 240):
    assert code in (-signal.SIGKILL, -signal.SIGABRT), err  # or it lost the other one first
  *_, before, newest = steps_of(workdir)
  files = (workdir / 'checkpoints' / str(newest) / 'state').rglob('d/*')
  largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  (code, first), (other_code, second) = ends(driver.start_all(workdir, often), 240)
  assert code == other_code == 0, first + second
  assert f'checkpoint {newest} is damaged, going back to the one before' in first
  assert largest.name in first
  assert f'going on from the checkpoint at step {before}' in first
  assert 'damaged' not in second  # process 0 prints the messages of the run
  assert driver.records_of(workdir)[1:] == driver.records_of(finished)[1:]


BINARIES = [
  ('evaluate', '--split=val', "--split: 'test' in process 0, 'val' in process 1"),
  ('diagnose', '--images=9', ''),
]


def start_binary(driver, name, workdir, *arguments, own=(), program=None):
  """Starts csba-NAME, or a program, on two processes."""
  address = f'127.0.0.1:{free_port()}'
  return [
    driver.start(
      f'--workdir={workdir}',
      *arguments,
      f'--coordinator={address}',
      '--processes=2',
      f'--process={i}',
      *dict(own).get(i, ()),
      devices=4,
      program=program or ('-m', f'csba_jax.bin.{name}'),
    )
    for i in range(2)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'flag', 'words'), BINARIES)
def test_flags_that_disagree_end_all_with_the_flag(driver, tmp_path, name, flag, words):
  for code, err in ends(start_binary(driver, name, tmp_path, own={1: [flag]})):
    assert code == 1, err
    assert 'expected the same flags in all processes; found ' in err
    assert words in err
    assert 'Traceback' not in err


EVALUATION = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import driver  # knows the net
from csba_jax.bin import evaluate as binary
from csba_jax.measure import evaluate
from csba_jax.runtime import distributed
step, calls = evaluate.eval_step, []
def slow_step(*args, **kwargs):
  calls.append(1)
  if distributed.count() == 1 or (distributed.index(), len(calls)) == (1, 3):
    os.kill(os.getpid(), {number})
  time.sleep(0.2)
  return step(*args, **kwargs)
evaluate.eval_step = slow_step
binary.cli()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(('number', 'expected'), [('signal.SIGTERM', 75), ('signal.SIGINT', 130)])
def test_an_evaluation_that_is_told_to_stop(driver, finished, number, expected):
  program = (
    '-c',
    EVALUATION.format(number=number, tests=str(Path(__file__).parents[1])),
  )
  for code, err in ends(start_binary(driver, 'evaluate', finished, program=program)):
    assert code == expected, err
    assert 'Traceback' not in err
  child = driver.start(f'--workdir={finished}', program=program)
  [(code, err)] = ends([child])
  assert code == expected, err
  assert err.endswith('stopped\n')


DIAGNOSIS = """
import sys
sys.path.insert(0, {tests!r})
import driver  # knows the net
from csba_jax.bin import diagnose
diagnose.cli()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_measure_the_batches_of_one(driver, finished, tmp_path):
  program = ('-c', DIAGNOSIS.format(tests=str(Path(__file__).parents[1])))
  arguments = ('--statistics=batch', '--batches=3', '--seed=5')
  alone, together = tmp_path / 'alone', tmp_path / 'together'
  for folder in (alone, together):
    shutil.copytree(finished, folder)
  children = start_binary(driver, 'diagnose', together, *arguments, program=program)
  children += [driver.start(f'--workdir={alone}', *arguments, devices=2, program=program)]
  for code, err in ends(children, 300):
    assert code == 0, err
  [name] = [path.name for path in (alone / 'conflict').glob('*_training_batches_seed5.npz')]
  of_one, of_two = (np.load(folder / 'conflict' / name) for folder in (alone, together))
  for key in ('grams', 'errors', 'losses', 'counts'):
    scale = np.abs(of_one[key]).max()
    assert scale > 0
    np.testing.assert_allclose(of_two[key], of_one[key], atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('every', [1, 18])
def test_surgery_of_two_processes_is_that_of_one(driver, tmp_path, every):
  wanted = ('name="upgrad"', f'every={every}', 'batches=3', 'certain=false')
  arguments = [f'--config.surgery.{setting}' for setting in wanted]
  children = driver.start_all(tmp_path / 'two', *arguments)
  alone = '--config.parallel.devices=0'
  children.append(driver.start(tmp_path / 'one', *arguments, alone, devices=8))
  for code, err in ends(children, 400):
    assert code == 0, err
  (_, of_two, last_two), (_, of_one, last_one) = (
    driver.records_of(tmp_path / name) for name in ('two', 'one')
  )
  assert [line['step'] for line in of_two] == [line['step'] for line in of_one]
  first = next(i for i, line in enumerate(of_one) if 'surgery_weights' in line)
  weights = [np.array(lines[first]['surgery_weights'], float) for lines in (of_two, of_one)]
  assert np.ptp(weights[0]) > 0.01  # something is in conflict
  np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-3)
  # later, last bits decide which constraints hold
  means = [result['surgery']['mean_weights'] for result in (last_two, last_one)]
  np.testing.assert_allclose(*means, atol=0.2)


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  try:
    command = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
    subprocess.run(command, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f'needs the right to mount a tmpfs: {error}')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_is_full_when_two_save(driver, finished, small_disk):
  workdir, filler = small_disk / 'run', small_disk / 'filler'
  for code, err in ends(driver.start_all(workdir, '--end=before-save:3'), 240):
    assert code in (-signal.SIGKILL, -signal.SIGABRT), err
  kept = steps_of(workdir)  # without 24 where its save was still under way
  disk = os.statvfs(small_disk)
  filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 20_000))  # room for lines, not for 36
  children = driver.start_all(workdir, f'--peer_timeout={PEER_TIMEOUT}')
  found = ends(children, 240)
  said = [line for _, err in found for line in err.splitlines() if 'driver.py: expected' in line]
  assert [code for code, _ in found] == [1, 1], found
  assert said, found
  assert all('free space' in line for line in said)
  assert set(kept) <= set(steps_of(workdir)) <= {12, 24}
  filler.unlink()
  for code, err in ends(driver.start_all(workdir), 240):
    assert code == 0, err
  assert driver.records_of(workdir)[1:] == driver.records_of(finished)[1:]
