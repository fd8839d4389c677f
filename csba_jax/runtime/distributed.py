"""Several processes of one run: how they find each other, agree, and notice that one is lost.

JAX's distributed runtime does it (one program on every process, collectives between them). Its
coordination service aborts the processes that are left when one is lost (exit code 134): a
collective that lost a member cannot be taken back. A process whose collective fails sooner ends
likewise. One that leaves with an error of its user's tells the others first: they leave with it.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from csba_jax.errors import UserError

T = TypeVar('T')
MODES = ('auto', 'on', 'off')
FAILED = 'csba_jax/failed'  # where a process tells the coordination service why it leaves
POLL = 1.0  # seconds between two looks at it
FAREWELL = 10.0  # seconds in which all are to have seen it
LONGEST_TEXT = 1 << 15  # bytes that a process may tell the others at once
# number of processes: what is there only in a step of srun, or under mpirun
_LAUNCHERS = {
  'SLURM_NTASKS': 'SLURM_STEP_NODELIST',
  'OMPI_COMM_WORLD_SIZE': 'OMPI_MCA_orte_hnp_uri',
}
_TPU_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')  # all of a slice, with commas


class AgreedError(UserError):
  """An error that all processes have at once: each may leave in the ordinary way."""


@dataclasses.dataclass(frozen=True)
class Launch:
  """How the processes of a run find each other.

  Attributes:
    mode: 'auto': by themselves under srun, mpirun (Open MPI 4) and on TPU hosts whose environment
      names the others, as GKE's does; 'on': in whatever way JAX finds, which on plain TPU VMs is
      to ask the metadata server ('auto' sends nothing over the network: such a VM is alone to it);
      'off': this process is the only one.
    coordinator: HOST:PORT of process 0 where nothing of that sort starts them; '' otherwise.
    processes: how many there are, with `coordinator`.
    process: which of them this is, from 0.
    start_timeout: seconds that they may wait for each other at the start.
    peer_timeout: seconds without a sign of life after which a process counts as lost.
  """

  mode: str = 'auto'
  coordinator: str = ''
  processes: int = 0
  process: int = -1
  start_timeout: int = 120
  peer_timeout: int = 60

  def check(self) -> None:
    """Raises UserError where the parts do not go together."""
    explicit = (self.coordinator != '', self.processes > 0, self.process >= 0)
    if any(explicit) and not all(explicit):
      raise UserError(
        '--coordinator, --processes and --process together',
        f'coordinator {self.coordinator!r}, processes {self.processes}, process {self.process}',
        'name all three, or none under srun, mpirun and on TPU slices',
      )
    host, _, port = self.coordinator.rpartition(':')
    if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
      raise UserError(
        '--coordinator=HOST:PORT with a port from 1 to 65535', repr(self.coordinator), 'correct it'
      )
    if self.process >= max(self.processes, 1):
      raise UserError(
        f'--process from 0 to {self.processes - 1}', str(self.process), 'count from 0'
      )
    if self.coordinator and self.mode == 'off':
      raise UserError('--distributed=auto with --coordinator', 'off', 'remove one of them')
    for name in ('start_timeout', 'peer_timeout'):
      if getattr(self, name) < 1:
        raise UserError(f'--{name} of at least 1 second', str(getattr(self, name)), 'raise it')

  @property
  def several(self) -> bool:
    """Whether there are others to wait for."""
    if self.coordinator:
      return self.processes > 1
    return self.mode == 'on' or (self.mode == 'auto' and _is_launched())


def _is_launched() -> bool:
  """Whether the environment says that srun, mpirun or GKE started others beside this process."""
  for size, step in _LAUNCHERS.items():
    if step in os.environ and int(os.environ.get(size, 1)) > 1:
      return True
  if int(os.environ.get('MEGASCALE_NUM_SLICES') or 1) > 1:  # of one TPU host each, perhaps
    return True
  return any(',' in os.environ.get(name, '') for name in _TPU_HOSTS)


def start(launch: Launch, give_up: Callable[[UserError], None]) -> None:
  """Meets the other processes; does nothing where this is the only one. Before any use of devices.

  Args:
    launch: how.
    give_up: ends the process; called from another thread when the others did not come in time.

  Raises:
    UserError: a launch that does not fit together, or that JAX refuses.
  """
  launch.check()
  if not launch.several:
    return
  if launch.process == 0:
    _check_port(launch.coordinator)
  import jax

  def late():
    give_up(
      UserError(
        f'{launch.processes or "all"} processes that meet at {_where(launch)} within '
        f'{launch.start_timeout} seconds',
        'not all of them',
        'start all, with the same --coordinator, and let its port through the firewall',
      )
    )

  alarm = threading.Timer(launch.start_timeout, late)
  alarm.daemon = True
  alarm.start()
  named = {'local_device_ids': _own_devices(os.environ)}
  if launch.coordinator:
    named = {
      'coordinator_address': launch.coordinator,
      'num_processes': launch.processes,
      'process_id': launch.process,
      'cluster_detection_method': 'deactivate',
    }
  try:
    jax.distributed.initialize(
      **named,
      initialization_timeout=launch.start_timeout + 60,  # the alarm comes first
      heartbeat_timeout_seconds=launch.peer_timeout,
      shutdown_timeout_seconds=launch.peer_timeout,
    )
  except (ValueError, RuntimeError, OSError) as error:
    raise UserError(
      f'processes that find each other at {_where(launch)}',
      str(error),
      'name the host of process 0 and a port that is free there'
      if launch.coordinator
      else 'start them with srun, mpirun or on TPU hosts, or name --coordinator, --processes and '
      '--process',
    ) from error
  finally:
    alarm.cancel()
  sys.excepthook = _leave_after_a_loss
  _watch_the_others()


_leaving = threading.Lock()  # held by the thread that ends this process


def leave(error: UserError) -> None:
  """Ends this process of several with an error of its own, code 1, once the others have seen it.

  They end with it, in the same way, wherever they are: a process that is merely gone would be lost
  to them, which a launcher would answer by starting all again.
  """
  _say_and_part(error, f'process {index()}: {error}')


def _say_and_part(error: UserError, told: str = '') -> None:
  """Prints the error, tells it to the others, meets them once more and ends the process."""
  with _leaving:
    print(f'{sys.argv[0].rsplit("/", 1)[-1]}: {error}', file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # whoever cannot be met is lost: this one leaves anyway
      from csba_jax.runtime import jax_internals

      client = jax_internals.coordination_client()
      if told:
        with contextlib.suppress(Exception):  # another one was first
          client.key_value_set(FAILED, told)
      client.wait_at_barrier(f'{FAILED}/seen', int(FAREWELL * 1000))
    if is_first():
      time.sleep(0.5)  # the service, which is this process, outlives those that ask it
    os._exit(1)


def _watch_the_others() -> None:
  """Looks, in a thread, whether another process has said why it leaves."""
  from csba_jax.runtime import jax_internals

  client = jax_internals.coordination_client()
  if client is None:
    return
  ended = threading.Event()

  def watch():
    while not ended.wait(POLL):
      with contextlib.suppress(Exception):  # there is nothing, or nobody to ask
        found = client.key_value_try_get(FAILED)
        _say_and_part(_of_another(found))

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()

  @atexit.register  # before JAX's own: no thread is to be in a call of C++ when Python ends
  def _end():
    ended.set()
    thread.join(FAREWELL)


def _of_another(found: str) -> AgreedError:
  return AgreedError('all processes ready', found, 'correct it there')


def _where(launch: Launch) -> str:
  """The address of process 0, which JAX may have found out."""
  from csba_jax.runtime import jax_internals

  found = launch.coordinator or jax_internals.coordinator_address()
  return found or 'the address that the launcher gives'


def _own_devices(environment: Mapping[str, str]) -> list[int] | None:
  """What JAX is to be told of a task's GPUs: [] = all it can see, None = one by its local number.

  The latter is what JAX does under srun and mpirun (and nowhere else): right where all tasks of a
  host see all its GPUs, and wrong where a task is alone there or was given its own ones.
  """
  if environment.get('JAX_LOCAL_DEVICE_IDS'):
    return None
  tasks = _tasks_here(environment)
  given = any(
    name in environment and (name != 'SLURM_TRES_PER_TASK' or 'gpu' in environment[name])
    for name in ('SLURM_GPUS_PER_TASK', 'SLURM_TRES_PER_TASK')
  )
  visible = environment.get('CUDA_VISIBLE_DEVICES', environment.get('ROCR_VISIBLE_DEVICES'))
  fewer = visible is not None and len([x for x in visible.split(',') if x]) < tasks
  return [] if tasks == 1 or given or fewer else None


def _tasks_here(environment: Mapping[str, str]) -> int:
  """How many tasks srun or mpirun started on this host; 0 if neither says."""
  if size := environment.get('OMPI_COMM_WORLD_LOCAL_SIZE'):
    return int(size)
  counts = []  # of each node; written 2(x3),1
  for part in environment.get('SLURM_STEP_TASKS_PER_NODE', '').split(','):
    if found := re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part):
      counts += [int(found[1])] * int(found[2] or 1)
  node = environment.get('SLURM_NODEID', '')
  return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def lost_another(error: BaseException | None) -> bool:
  """Whether an error says that another process of the run is gone: not this one's fault."""
  if count() == 1:
    return False
  from csba_jax.runtime import jax_internals

  while error is not None:
    if jax_internals.tells_of_a_lost_process(error):
      return True
    error = error.__cause__
  return False


def _leave_after_a_loss(kind, error, traceback) -> None:
  """What follows an error that nothing has handled: an abort where another process is gone."""
  if not lost_another(error):
    sys.__excepthook__(kind, error, traceback)
    return
  if _leaving.locked():  # it had said why it leaves
    time.sleep(2 * FAREWELL)
  reason = ' '.join(str(error).split())[:300]
  print(f'another process of the run is lost: {reason}', file=sys.stderr, flush=True)
  os.abort()  # as the coordination service would soon; an ordinary end would wait for the other


def _check_port(coordinator: str) -> None:
  """Raises UserError where the first process cannot listen.

  JAX would share the port with a coordinator that is left of another run, and may crash (a
  segmentation fault of jaxlib 0.10.2) where something else has it.
  """
  named = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or coordinator.rpartition(':')[2]
  host, _, port = named.rpartition(':')
  host = host.strip('[]')
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    socket.create_server((host, int(port)), family=family).close()
  except (OSError, ValueError) as error:
    raise UserError(
      'a port that process 0 can listen to',
      f'{named}: {getattr(error, "strerror", None) or error}',
      'name another one in --coordinator of all processes',
    ) from error


def count() -> int:
  """How many processes the run has."""
  return sys.modules['jax'].process_count() if _have_met() else 1


def index() -> int:
  """Which of them this is, from 0."""
  return sys.modules['jax'].process_index() if _have_met() else 0


def _have_met() -> bool:
  jax = sys.modules.get('jax')  # a process that never needed it is alone
  return jax is not None and jax.distributed.is_initialized()


def is_first() -> bool:
  """Whether this process writes the records and speaks for the run."""
  return index() == 0


def gather(text: str) -> list[str]:
  """What each process says, in their order; a text of up to LONGEST_TEXT bytes."""
  if count() == 1:
    return [text]
  from jax.experimental import multihost_utils

  data = text.encode()[:LONGEST_TEXT]
  words = np.zeros(LONGEST_TEXT, np.uint8)
  words[: len(data)] = np.frombuffer(data, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(words))
  return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in rows]


def together(action: Callable[[], T]) -> T:
  """What `action` returns; where it fails with a UserError in one process, it fails in all.

  Raises:
    AgreedError: with the process's own error, or else with the first of another.
  """
  if count() == 1:
    return action()
  problem, result = None, None
  try:
    result = action()
  except AgreedError:  # the others have it as well and do not wait for this one
    raise
  except UserError as error:
    problem = error
  problems = gather(str(problem) if problem else '')
  if problem:
    raise AgreedError(*_parts(problem)) from problem
  for process, found in enumerate(problems):
    if found:
      raise _of_another(f'process {process}: {found}')
  return result


def check_equal(
  what: str,
  mine: Mapping[str, Any],
  do: str = 'start all of them with the same command',
) -> None:
  """Raises AgreedError in every process unless all have the same values.

  Args:
    what: they are.
    mine: this process's, by name, such as JSON can hold.
    do: what puts it right.
  """
  first, *others = map(json.loads, gather(json.dumps(mine)))
  for process, other in enumerate(others, 1):
    if different := [
      f'{name}: {first[name]!r} there, {other[name]!r} here'
      for name in sorted(first)
      if first[name] != other[name]
    ]:
      raise AgreedError(
        f'the same {what} in all processes',
        f'in process {process} other than in process 0: {"; ".join(different)}',
        do,
      )


def broadcast(text: str) -> str:
  """What the first process says."""
  return gather(text if is_first() else '')[0]


def wait() -> None:
  """Returns once every process is here."""
  gather('')


def _parts(error: UserError) -> tuple[str, str, str]:
  return error.expected, error.found, error.do
