"""launch/slurm.sbatch on a SLURM of its own: one node, this machine, while these tests run."""

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / 'launch/slurm.sbatch'
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'scancel', 'squeue')
REASONS = [
  f'no {name}: apt-get install slurm-wlm munge' for name in PROGRAMS if not shutil.which(name)
]
if not hasattr(os, 'geteuid') or os.geteuid():
  REASONS.append('only root may run a slurmd')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.timeout(900),
  pytest.mark.skipif(bool(REASONS), reason='; '.join(REASONS)),
]
# Two partitions on one node: a job of `high` takes the place of one in `low`.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=3600
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/daemon
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=localhost PriorityTier=10 PreemptMode=OFF
"""
STUDY = """
from csba_jax.study import grid


def get_config():
  c = grid.default()
  c.name = 'small'
  c.base.data.imbalance_factor = 20.0
  c.base.data.test_fraction = 0.3
  c.base.model.width = 0.05
  c.base.train.batch_size = 32
  c.base.train.epochs = 1
  c.variants = ('none',)
  c.seeds = 24
  return c
"""
TRAIN = """
from csba_jax import config


def get_config():
  c = config.default()
  c.data.imbalance_factor = 20.0
  c.data.test_fraction = 0.3
  c.model.width = 0.05
  c.train.batch_size = 32
  c.train.epochs = 6
  return c
"""
# A program that waits, and ends as it is told: signals and tasks without the weight of a training.
STUB = """\
import os, signal, sys, time
rank, ranks = os.environ['SLURM_PROCID'], os.environ['SLURM_NTASKS']
print('tasks of node', os.environ['SLURM_NODEID'], os.environ['SLURM_STEP_TASKS_PER_NODE'])
print('task', rank, 'of', ranks, sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), os._exit(75)))
if sys.argv[1].isdigit():
  os._exit(int(sys.argv[1]))
if sys.argv[1] == 'abort' and rank == '1':
  os.abort()
if sys.argv[1] == 'killed' and not os.environ.get('SLURM_RESTART_COUNT'):
  if rank == '1':
    os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(1)
  os.abort()  # as the others do that lost it
if sys.argv[1] in ('once', 'killed') and os.environ.get('SLURM_RESTART_COUNT'):
  os._exit(0)
time.sleep(600 if sys.argv[1] != 'abort' else 1)
"""


def free_ports(number):
  """So many free ports of this machine."""
  sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(number)]
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  return ports


def wait_for(what, seconds=120, every=0.5):
  """The first true value of what()."""
  end = time.monotonic() + seconds
  while not (value := what()):
    assert time.monotonic() < end, f'{what} after {seconds} s'
    time.sleep(every)
  return value


class Cluster:
  """A controller and a node in a folder, and the commands for them."""

  def __init__(self, folder):
    self.folder, self.daemons = folder, []
    controller, daemon = free_ports(2)
    (folder / 'slurm.conf').write_text(
      CONFIG.format(folder=folder, controller=controller, daemon=daemon)
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_', 'XLA_'))}
    self.env = clean | {
      'SLURM_CONF': str(folder / 'slurm.conf'),
      'BIN': str(folder / 'bin'),
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
    }
    (folder / 'bin').mkdir()
    (folder / 'stub.py').write_text(STUB)
    commands = {
      'csba-study': '-m csba_jax.bin.study',
      'csba-train': '-m csba_jax.bin.train',
      'stub': folder / 'stub.py',
    }
    for name, command in commands.items():
      (folder / 'bin' / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
      (folder / 'bin' / name).chmod(0o755)

  def start(self):
    f = self.folder
    (f / 'munge.key').write_bytes(os.urandom(128))
    (f / 'munge.key').chmod(0o400)
    places = {'key-file': 'key', 'socket': 'socket', 'pid-file': 'pid', 'log-file': 'log'}
    options = [f'--{name}={f}/munge.{end}' for name, end in places.items()]
    self._daemon('munged', '--foreground', '--force', *options, f'--seed-file={f}/munge.seed')
    wait_for((f / 'munge.socket').exists, 20)
    self._daemon('slurmctld', '-D', '-c')
    self._daemon('slurmd', '-D', '-N', 'localhost')
    wait_for(lambda: 'idle' in self('sinfo', '--noheader', '--format=%T', check=False), 60)

  def _daemon(self, *command):
    with open(self.folder / f'{command[0]}.log', 'w') as log:
      self.daemons.append(
        subprocess.Popen(
          command,
          env=self.env,
          cwd=self.folder,
          stdout=log,
          stderr=log,
          stdin=subprocess.DEVNULL,
        )
      )

  def stop(self):
    """Ends jobs, then daemons, and checks that they are gone."""
    self('scancel', '--user=root', check=False)
    with contextlib.suppress(AssertionError):
      wait_for(lambda: not self('squeue', '--noheader', check=False), 60)
    for daemon in reversed(self.daemons):
      daemon.send_signal(signal.SIGTERM)
      try:
        daemon.wait(timeout=30)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()

  def processes(self):
    """Command lines of what still runs for this cluster: all of it knows the configuration."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        if str(self.folder).encode() in (process / 'environ').read_bytes():
          found.append((process / 'cmdline').read_bytes())
    return found

  def __call__(self, *command, check=True):
    done = subprocess.run(command, env=self.env, capture_output=True, text=True, cwd=self.folder)
    assert done.returncode == 0 or not check, f'{command}: {done.stderr}'
    return done.stdout.strip()

  def submit(self, *arguments, options=(), **env):
    """Job id of launch/slurm.sbatch with these arguments."""
    self.env, before = self.env | env, self.env
    try:
      return self('sbatch', '--parsable', '--mem=100', *options, str(LAUNCHER), *arguments)
    finally:
      self.env = before

  def field(self, job, name):
    """A field of a job as `scontrol show job` has it."""
    words = self('scontrol', 'show', 'job', job).split()
    return dict(word.split('=', 1) for word in words if '=' in word)[name]

  def state(self, job):
    return self.field(job, 'JobState')

  def log(self, job):
    """The output of a job."""
    path = self.folder / f'slurm-{job}.out'
    return path.read_text() if path.exists() else ''

  def ended(self, job):
    """The state of a job that has ended."""
    busy = {'PENDING', 'RUNNING', 'COMPLETING', 'SUSPENDED'}
    return wait_for(lambda: (s := self.state(job)) not in busy and s, 240)

  def requeued(self, job):
    """Waits until a job is in the queue again, then spares it the two minutes of waiting.

    Not before the node has put away its script: it would put away that of the new start.
    """
    wait_for(lambda: self.state(job) == 'PENDING' and self.field(job, 'Restarts') != '0', 120)
    script = self.folder / f'daemon/job{int(self.field(job, "JobId")):05}'
    wait_for(lambda: not script.exists(), 60)
    time.sleep(1)
    self('scontrol', 'update', f'JobId={job}', 'StartTime=now')


@pytest.fixture(scope='module')
def cluster():
  folder = Path(tempfile.mkdtemp(prefix='slurm-'))  # short: a socket's path has 108 characters
  folder.chmod(0o755)
  cluster = Cluster(folder)
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.stop()
    left = cluster.processes()
    shutil.rmtree(folder, ignore_errors=True)
  assert not left


@pytest.fixture(autouse=True)
def empty_queue(request):
  yield
  cluster = request.getfixturevalue('cluster')
  cluster('scancel', '--user=root')
  wait_for(lambda: not cluster('squeue', '--noheader'))


def runs_of(path):
  """Names of the runs in a file of results, as often as they are there."""
  if not path.exists():
    return Counter()
  records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]
  assert all(record['status'] == 'done' for record in records)
  return Counter(record['run'] for record in records)


def test_an_array_survives_preemption_with_every_run_done_once(cluster, tmp_path):
  """Two shards of a study; a job of the high partition takes the node from both on the way."""
  (tmp_path / 'study_small.py').write_text(STUDY)
  results = tmp_path / 'results'
  job = cluster.submit(
    'csba-study',
    f'--config={tmp_path}/study_small.py',
    f'--workdir={results}',
    options=['--array=0-1', '--partition=low'],
  )
  shards = [results / f'results-00{i}-of-002.jsonl' for i in range(2)]
  wait_for(lambda: any(map(runs_of, shards)), 240, 0.1)  # one may be well ahead of the other
  high = cluster('sbatch', '--parsable', '--partition=high', '--cpus-per-task=2', '--wrap=sleep 1')
  for i in range(2):
    cluster.requeued(f'{job}_{i}')
    assert 'exit 75, to be restarted' in cluster.log(f'{job}_{i}')
    assert sum(runs_of(shards[i]).values()) < 12, 'preempted on the way'
  assert cluster.ended(high) == 'COMPLETED'
  for i in range(2):
    assert cluster.ended(f'{job}_{i}') == 'COMPLETED'
    assert cluster.field(f'{job}_{i}', 'Restarts') == '1'
    assert '12 runs done, 0 failed, 0 missing' in cluster.log(f'{job}_{i}')
  assert runs_of(shards[0]) + runs_of(shards[1]) == Counter(f's{seed}' for seed in range(24))


def test_near_the_end_of_its_time_a_job_saves_and_is_started_again(cluster):
  """--signal=B:TERM reaches only the batch shell, which passes it on to the step."""
  options = ['--time=1', '--signal=B:TERM@50']
  job = cluster.submit('stub', 'once', options=options)
  cluster.requeued(job)
  assert 'told\n' in cluster.log(job)
  assert cluster.ended(job) == 'COMPLETED'
  assert cluster.log(job).count('task 0 of 1') == 2


def test_one_element_is_told_and_the_others_are_not(cluster):
  """The last element has the id of the whole array: its trap must not stop the first."""
  job = cluster.submit('stub', 'once', options=['--array=0-1'])
  wait_for(lambda: all('task 0' in cluster.log(f'{job}_{i}') for i in range(2)))
  cluster('scancel', '--batch', '--signal=TERM', f'{job}_1')
  cluster.requeued(f'{job}_1')
  assert cluster.ended(f'{job}_1') == 'COMPLETED'
  assert "['once', '--shard=1/2']" in cluster.log(f'{job}_1')
  assert cluster.state(f'{job}_0') == 'RUNNING'
  assert cluster.field(f'{job}_0', 'Restarts') == '0'
  assert 'told' not in cluster.log(f'{job}_0')


def test_a_cancelled_job_stays_cancelled(cluster):
  job = cluster.submit('stub', 'once')
  wait_for(lambda: 'task 0' in cluster.log(job))
  cluster('scancel', job)
  assert cluster.ended(job) == 'CANCELLED'
  time.sleep(5)
  assert cluster.state(job) == 'CANCELLED'
  assert cluster.field(job, 'Restarts') == '0'


@pytest.mark.parametrize(('code', 'state'), [('0', 'COMPLETED'), ('1', 'FAILED'), ('9', 'FAILED')])
def test_other_exit_codes_end_the_job(cluster, code, state):
  job = cluster.submit('stub', code)
  assert cluster.ended(job) == state
  assert cluster.field(job, 'ExitCode') == f'{code}:0'
  assert cluster.field(job, 'Restarts') == '0'


def test_restarts_have_a_limit(cluster):
  job = cluster.submit('stub', '75', RESTARTS='1')
  cluster.requeued(job)
  assert cluster.ended(job) == 'FAILED'
  assert 'exit 75, restarted 1 times: not restarted again' in cluster.log(job)


def test_a_training_has_a_process_for_each_task_and_survives_the_loss_of_one(cluster):
  job = cluster.submit('stub', 'abort', options=['--ntasks=2'])
  cluster.requeued(job)
  log = cluster.log(job)
  assert "0: task 0 of 2 ['abort']" in log
  assert "1: task 1 of 2 ['abort']" in log
  assert (
    'tasks of node 0 2' in log
  )  # what csba_jax.runtime.distributed counts the tasks of a host by
  assert f'task 1 on {platform.node()} left with 134' in log  # which process was lost
  assert 'exit 134, to be restarted' in log


def test_a_killed_task_is_one_that_the_others_have_lost(cluster):
  """The code of the killed task, 137, is higher than the 134 of those that lost it."""
  job = cluster.submit('stub', 'killed', options=['--ntasks=2'])
  cluster.requeued(job)
  log = cluster.log(job)
  assert f'task 1 on {platform.node()} left with 137' in log
  assert 'exit 134, to be restarted' in log
  assert cluster.ended(job) == 'COMPLETED'


def test_all_tasks_of_a_training_are_told(cluster):
  job = cluster.submit('stub', 'once', options=['--ntasks=2'])
  wait_for(lambda: cluster.log(job).count('of 2') == 2)
  cluster('scancel', '--batch', '--signal=TERM', job)
  cluster.requeued(job)
  assert cluster.log(job).count('told') == 2
  assert cluster.ended(job) == 'COMPLETED'


@pytest.mark.parametrize(
  ('arguments', 'array', 'words'),
  [
    ([], None, 'expected a command, got none'),
    (['stub', '0'], '1-2', 'set SHARDS to the number of all shards'),
  ],
)
def test_bad_input_is_one_line(cluster, arguments, array, words):
  job = cluster.submit(*arguments, options=[f'--array={array}'] if array else [])
  job += '_1' if array else ''
  assert cluster.ended(job) == 'FAILED'
  assert cluster.field(job, 'ExitCode') == '1:0'
  assert len(cluster.log(job).splitlines()) == 1
  assert words in cluster.log(job)


def test_shards_can_be_told_for_a_part_of_an_array(cluster):
  job = cluster.submit('stub', '0', options=['--array=2'], SHARDS='4')
  assert cluster.ended(f'{job}_2') == 'COMPLETED'
  assert "['0', '--shard=2/4']" in cluster.log(f'{job}_2')


def test_a_training_of_two_processes_saves_and_goes_on(cluster, tmp_path):
  """csba-train itself: both connect, stop at one step when asked to, and finish after a restart."""
  config = tmp_path / 'train.py'
  config.write_text(TRAIN)
  workdir, port = tmp_path / 'run', str(free_ports(1)[0])
  job = cluster.submit(
    'csba-train',
    f'--config={config}',
    f'--workdir={workdir}',
    options=['--ntasks=2'],
    JAX_COORDINATOR_PORT=port,
    JAX_COORDINATOR_BIND_ADDRESS=f'127.0.0.1:{port}',
  )
  metrics = workdir / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text().count('\n') >= 2, 240)
  cluster('scancel', '--batch', '--signal=TERM', job)
  cluster.requeued(job)
  assert 'exit 75, to be restarted' in cluster.log(job)
  saved = metrics.read_text()
  assert cluster.ended(job) == 'COMPLETED', cluster.log(job)
  assert metrics.read_text().startswith(saved)
  assert (workdir / 'result.json').exists()
  lines = metrics.read_text().splitlines()
  assert len(set(lines)) == len(lines)
