"""Several processes of one run: how they connect, agree, and notice that one is lost.

All processes run the same program, and JAX's distributed runtime connects them. If one process is
lost, JAX's coordination service aborts the others (exit code 134), because a collective that lost a
member cannot be completed. If a collective fails earlier than that, its process aborts itself. A
process that ends with a UserError tells the others first, and they end with the same error.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from csba_jax.errors import UserError

T = TypeVar('T')
MODES = ('auto', 'on', 'off')
FAILED = 'csba_jax/failed'  # key of the coordination service: the error of the process that failed
POLL = 1.0  # seconds between two reads of that key
FAREWELL = 10.0  # seconds that a process which failed waits until the others have read it
LONGEST_TEXT = 1 << 15  # bytes of a text that `gather` sends
# variable with the number of processes: variable that only a step of srun, or mpirun, sets
_LAUNCHERS = {
  'SLURM_NTASKS': 'SLURM_STEP_NODELIST',
  'OMPI_COMM_WORLD_SIZE': 'OMPI_MCA_orte_hnp_uri',
}
# variables with all hosts of a slice, separated by commas
_TPU_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')


class AgreedError(UserError):
  """An error that all processes raise together: each of them may simply exit."""


@dataclasses.dataclass(frozen=True)
class Launch:
  """How the processes of a run find each other.

  Attributes:
    mode: 'auto' uses the environment that srun, mpirun (Open MPI 4) or GKE (for TPU hosts) sets; it
      sends nothing over the network, so a plain TPU VM counts as the only process. 'on' uses every
      way that JAX knows, on plain TPU VMs the metadata server. 'off': this is the only process.
    coordinator: HOST:PORT of process 0, where the environment does not name it; else ''.
    processes: number of processes, with `coordinator`.
    process: index of this process, from 0, with `coordinator`.
    start_timeout: seconds that the processes wait for each other at the start.
    peer_timeout: seconds without a heartbeat after which a process counts as lost.
  """

  mode: str = 'auto'
  coordinator: str = ''
  processes: int = 0
  process: int = -1
  start_timeout: int = 120
  peer_timeout: int = 60

  def check(self) -> None:
    """Raises UserError if the fields contradict each other."""
    explicit = (self.coordinator != '', self.processes > 0, self.process >= 0)
    if any(explicit) and not all(explicit):
      raise UserError(
        '--coordinator, --processes and --process together',
        f'coordinator {self.coordinator!r}, processes {self.processes}, process {self.process}',
        'set all three, or none under srun, mpirun and on TPU slices',
      )
    host, _, port = self.coordinator.rpartition(':')
    if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
      raise UserError(
        '--coordinator=HOST:PORT with a port from 1 to 65535',
        repr(self.coordinator),
        'set it to the address of process 0, such as host1:12355',
      )
    if self.process >= max(self.processes, 1):
      raise UserError(
        f'--process from 0 to {self.processes - 1}', str(self.process), 'number from 0'
      )
    if self.coordinator and self.mode == 'off':
      raise UserError('--distributed=auto with --coordinator', 'off', 'remove one of them')
    for name in ('start_timeout', 'peer_timeout'):
      if getattr(self, name) < 1:
        found = str(getattr(self, name))
        raise UserError(f'--{name} of at least 1 second', found, 'set it to 1 or more')

  @property
  def several(self) -> bool:
    """Whether the run has other processes to wait for."""
    if self.coordinator:
      return self.processes > 1
    return self.mode == 'on' or (self.mode == 'auto' and _is_launched())


def _is_launched() -> bool:
  """Whether the environment says that srun, mpirun or GKE started other processes too."""
  for size, step in _LAUNCHERS.items():
    if step in os.environ and int(os.environ.get(size, 1)) > 1:
      return True
  if int(os.environ.get('MEGASCALE_NUM_SLICES') or 1) > 1:  # each may have one host
    return True
  return any(',' in os.environ.get(name, '') for name in _TPU_HOSTS)


def start(launch: Launch, give_up: Callable[[UserError], None]) -> None:
  """Connects this process to the others of its run, if there are any.

  Call it before anything uses devices.

  Args:
    launch: how they find each other.
    give_up: ends the process; another thread calls it if the others do not connect in time.

  Raises:
    UserError: a launch whose fields contradict each other, or that JAX refuses.
  """
  launch.check()
  if not launch.several:
    return
  if launch.process == 0:
    _check_port(launch.coordinator)
  import jax

  def late() -> None:
    give_up(
      UserError(
        f'{launch.processes or "all"} processes connected to {_where(launch)} within '
        f'{launch.start_timeout} seconds',
        'not all of them',
        'start all of them with the same --coordinator, and open its port in the firewall',
      )
    )

  alarm = threading.Timer(launch.start_timeout, late)
  alarm.daemon = True
  alarm.start()
  named: dict[str, Any] = {'local_device_ids': _own_devices(os.environ)}
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
      initialization_timeout=launch.start_timeout + 60,  # later than the alarm
      heartbeat_timeout_seconds=launch.peer_timeout,
      shutdown_timeout_seconds=launch.peer_timeout,
    )
  except (ValueError, RuntimeError, OSError) as error:
    raise UserError(
      f'processes connected to {_where(launch)}',
      str(error),
      'set --coordinator to the host of process 0 and a free port of it'
      if launch.coordinator
      else 'start them with srun, mpirun or on TPU hosts, or set --coordinator, --processes and '
      '--process',
    ) from error
  finally:
    alarm.cancel()
  global _longest_end
  _longest_end = launch.peer_timeout + FAREWELL
  sys.excepthook = _leave_after_a_loss
  # JAX aborts from a thread of its own. If Python then printed the stacks of all threads, which
  # still run, it might read one that is gone: exit code 139, where the launchers wait for 134.
  faulthandler.enable(all_threads=False)
  _watch_the_others()


_leaving = threading.Lock()  # held by the thread that ends this process
_end_of_watch = threading.Event()  # set when errors of the others end this process no more
_longest_end = FAREWELL  # seconds that `meet_at_the_end` takes at most


def leave(error: UserError) -> None:
  """Ends this process with an error of its own (exit code 1), once the others have read it.

  They end with the same error, wherever they are. If this process just ended, they would count it
  as lost and abort, and a launcher would start all of them again.
  """
  _end_with(error, f'process {index()}: {error}')


def _end_with(error: UserError, told: str = '') -> None:
  """Prints the error, sends `told` to the others, waits until all have read it, and exits."""
  with _leaving:
    print(f'{sys.argv[0].rsplit("/", 1)[-1]}: {error}', file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # if another one does not answer, end anyway
      from csba_jax.runtime import jax_internals

      client = jax_internals.coordination_client()
      if told:
        with contextlib.suppress(Exception):  # another process failed first
          client.key_value_set(FAILED, told)
      client.wait_at_barrier(f'{FAILED}/seen', int(FAREWELL * 1000))
    if is_first():
      time.sleep(0.5)  # this process runs the service, which the others still need
    os._exit(1)


def meet_at_the_end() -> None:
  """Waits for the other processes, and disconnects from them. Call it last, then os._exit.

  A normal end of Python would let JAX destroy its collectives before the processes meet. Then one
  of them may wait for ever for a part that another one has not sent.
  """
  import jax

  _end_of_watch.set()

  def meet() -> None:
    with contextlib.suppress(Exception):  # another one is lost: the work of this one is done
      jax.distributed.shutdown()  # it waits `peer_timeout` at most

  meeting = threading.Thread(target=meet, daemon=True)
  meeting.start()
  meeting.join(_longest_end)


def _watch_the_others() -> None:
  """Starts a thread that looks for an error of another process."""
  from csba_jax.runtime import jax_internals

  client = jax_internals.coordination_client()
  if client is None:
    return

  def watch() -> None:
    while not _end_of_watch.wait(POLL):
      with contextlib.suppress(Exception):  # there is no error, or no service
        found = client.key_value_try_get(FAILED)
        _end_with(_of_another(found))

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()

  @atexit.register  # before JAX's own handler: no thread may be inside C++ when Python ends
  def _end() -> None:
    _end_of_watch.set()
    thread.join(FAREWELL)


def _of_another(found: str) -> AgreedError:
  return AgreedError('no error in any process', found, 'correct it there')


def _where(launch: Launch) -> str:
  """The address of process 0, for a message."""
  from csba_jax.runtime import jax_internals

  found = launch.coordinator or jax_internals.coordinator_address()
  return found or 'the address that the launcher gives'


def _own_devices(environment: Mapping[str, str]) -> list[int] | None:
  """`local_device_ids` for jax.distributed: [] is every GPU that this task sees, None JAX's choice.

  Under srun and mpirun (and nowhere else) JAX chooses one GPU, by the local index of the task. That
  is right if every task of a host sees all its GPUs. It is wrong if a task has the host for itself,
  or if the launcher gave it GPUs of its own.
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
  """Number of tasks that srun or mpirun started on this host; 0 if neither says."""
  if size := environment.get('OMPI_COMM_WORLD_LOCAL_SIZE'):
    return int(size)
  counts = []  # tasks of each node, written as 2(x3),1
  for part in environment.get('SLURM_STEP_TASKS_PER_NODE', '').split(','):
    if found := re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part):
      counts += [int(found[1])] * int(found[2] or 1)
  node = environment.get('SLURM_NODEID', '')
  return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def lost_another(error: BaseException | None) -> bool:
  """Whether an error, or one of its causes, says that another process of the run is lost."""
  if count() == 1:
    return False
  from csba_jax.runtime import jax_internals

  while error is not None:
    if jax_internals.tells_of_a_lost_process(error):
      return True
    error = error.__cause__
  return False


def _leave_after_a_loss(
  kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
) -> None:
  """sys.excepthook of several processes: after the loss of another process it aborts."""
  if not lost_another(error):
    sys.__excepthook__(kind, error, traceback)
    return
  if _leaving.locked():  # the other process said why it ended: that thread ends this one
    time.sleep(2 * FAREWELL)
  reason = ' '.join(str(error).split())[:300]
  print(f'another process of the run is lost: {reason}', file=sys.stderr, flush=True)
  os.abort()  # as the coordination service would soon; a normal exit would wait for the lost one


def _check_port(coordinator: str) -> None:
  """Raises UserError if process 0 cannot listen on the port of the coordinator.

  JAX does not check it. It would share the port with the coordinator of an earlier run. If another
  program has the port, JAX may crash (a segmentation fault in jaxlib 0.10.2).
  """
  named = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or coordinator.rpartition(':')[2]
  host, _, port = named.rpartition(':')
  host = host.strip('[]')
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    socket.create_server((host, int(port)), family=family).close()
  except (OSError, ValueError) as error:
    raise UserError(
      'a port on which process 0 can listen',
      f'{named}: {getattr(error, "strerror", None) or error}',
      'set --coordinator of all processes to another port',
    ) from error


def count() -> int:
  """Number of processes of the run."""
  return sys.modules['jax'].process_count() if _have_met() else 1


def index() -> int:
  """Index of this process, from 0."""
  return sys.modules['jax'].process_index() if _have_met() else 0


def _have_met() -> bool:
  jax = sys.modules.get('jax')  # several processes have imported it
  return jax is not None and jax.distributed.is_initialized()


def is_first() -> bool:
  """Whether this is process 0, which writes the records and prints the messages of the run."""
  return index() == 0


def gather(text: str) -> list[str]:
  """The text of each process, in their order; a longer one is cut to LONGEST_TEXT bytes."""
  if count() == 1:
    return [text]
  import jax

  data = text.encode()[:LONGEST_TEXT]
  words = np.zeros(LONGEST_TEXT, np.uint8)
  words[: len(data)] = np.frombuffer(data, np.uint8)
  shape = (count(), jax.local_device_count())
  mesh = jax.sharding.Mesh(np.reshape(jax.devices(), shape), ('processes', 'devices'))
  each = jax.sharding.NamedSharding(mesh, jax.P('processes'))
  whole = jax.sharding.NamedSharding(mesh, jax.P())
  sent = jax.make_array_from_process_local_data(each, words[None])
  # the copies of all devices are waited for: this process may end next, and others need its part
  found = jax.block_until_ready(jax.jit(_same, out_shardings=whole)(sent))
  return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in np.asarray(found)]


def _same(x: T) -> T:
  return x


def together(action: Callable[[], T]) -> T:
  """What `action` returns; if it raises a UserError in one process, all processes raise.

  Raises:
    AgreedError: the error of this process, else the first error of another one.
  """
  if count() == 1:
    return action()
  problem: UserError | None = None
  try:
    result = action()
  except AgreedError:  # the others raise it too and do not wait for this one
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
    what: the values are, for the message.
    mine: the values of this process by name, as JSON can hold them.
    do: what the user should do if they differ.
  """
  first, *others = map(json.loads, gather(json.dumps(mine)))
  for process, other in enumerate(others, 1):
    if different := [
      f'{name}: {first[name]!r} in process 0, {other[name]!r} in process {process}'
      for name in sorted(first)
      if first[name] != other[name]
    ]:
      raise AgreedError(f'the same {what} in all processes', '; '.join(different), do)


def broadcast(text: str) -> str:
  """The text of process 0, in every process."""
  return gather(text if is_first() else '')[0]


def wait() -> None:
  """Waits until every process has called it."""
  gather('')


def _parts(error: UserError) -> tuple[str, str, str]:
  return error.expected, error.found, error.do
