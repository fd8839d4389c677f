"""Ends runs at random moments, again and again, and compares what comes out with undisturbed ones.

  python tests/soak.py [--ends=20] [--seed=0] [--settings=one,two] [--signals=KILL,TERM]
    [--epochs=N] [--minutes=M] [--out=FILE.md] [--keep=DIR]

A run is started over and over; each of its first LIVES lives is ended by a signal, to one process
of it. Half of the moments are drawn from the time that an undisturbed run takes; since most of that
is starting and compiling, the others are drawn from what it does after: a kind of AIMS, one of its
turns, a moment of it. The next life is left alone, and the end must be the undisturbed one's to the
bit. A line for each signal goes to standard output, the summary to --out. Exit code 1 where
anything was not as promised.
The settings go on side by side. After M minutes no further signal is sent.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import driver
import jax
import numpy as np

from csba_jax.methods import optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.run.checkpoint import Checkpoints

LIVES = 5  # of a run, that are ended
PEER_TIMEOUT, START_TIMEOUT = 10, 30  # seconds
# seconds in which all processes are to have left, after what has to be compiled
LIMIT = {'KILL': 60, 'TERM': 30}
PATIENCE = 180  # seconds after which a process counts as hanging
OPTIONS = (
  '--config.diagnostics.every=7',
  '--config.diagnostics.snapshots="0,0.5,1"',
  '--config.train.save_every=5',
)
PHASES = {
  '': 'start-up',  # imports, meeting the others
  'start': 'loading',
  'before-load': 'loading',
  'after-load': 'loading',
  'before-config': 'loading',
  'after-config': 'restoring',
  'before-diagnosis': 'diagnosing',
  'before-snapshot': 'diagnosing',
  'before-save': 'saving',
  'saving': 'saving',
  'before-last-wait': 'saving',
  'before-evaluation': 'evaluating',
  'before-result': 'finishing',
  'after-result': 'finishing',
}
ORDER = (
  'start-up',
  'loading',
  'restoring',
  'compiling',
  'training',
  'saving',
  'evaluating',
  'diagnosing',
  'finishing',
)
AIMS = {  # seconds that a turn takes, about, on one device once it is compiled
  'before-step': 0.002,
  'before-save': 0.02,
  'before-evaluation': 0.003,
  'before-diagnosis': 0.005,
  'before-snapshot': 0.1,
}
NOTHING_TO_SAVE = ('start-up', 'loading', 'restoring')
COMPILATION = ('restoring', 'compiling')  # a signal that comes behind the last look before it
COMPILED = ('before-step', 'before-diagnosis', 'before-snapshot', 'before-evaluation')


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is run, on how many processes of how many devices."""

  name: str
  processes: int
  devices: int
  epochs: int

  def start(self, workdir, traces=()):
    """Its processes."""
    options = (*OPTIONS, f'--config.train.epochs={self.epochs}')
    own = {i: [f'--trace={trace}'] for i, trace in enumerate(traces)}
    if self.processes == 1:
      return [driver.start(workdir, *options, *own.get(0, ()), devices=self.devices)]
    options += (f'--peer_timeout={PEER_TIMEOUT}', f'--start_timeout={START_TIMEOUT}')
    return driver.start_all(
      workdir, *options, processes=self.processes, devices=self.devices, own=own
    )


SETTINGS = {'one': Setting('one', 1, 1, 12), 'two': Setting('two', 2, 4, 6)}


@dataclasses.dataclass(frozen=True)
class Moment:
  """So many seconds after the start, or after the n-th arrival at a place."""

  seconds: float
  place: str = ''
  turn: int = 0

  def __str__(self):
    if not self.place:
      return f'after {self.seconds:.1f} s'
    return f'{1000 * self.seconds:.1f} ms after {self.place}:{self.turn}'

  def counts_from(self, trace):
    """Whether its seconds have begun."""
    return not self.place or arrivals(trace).count(self.place) >= self.turn


@dataclasses.dataclass
class End:
  """One signal and what came of it."""

  signal: str
  moment: Moment
  told: int  # process
  phase: str  # in which it came
  seconds: list[float]  # until each process had left
  codes: list[int]
  logs: list[str]
  steps: list[int]  # with a checkpoint, after it
  finished: bool  # whether result.json is there

  @property
  def saved_at(self):
    """Step at which the run says that it stopped, or None."""
    found = re.search(r'stopped at step (\d+): saved', self.logs[0])
    return int(found[1]) if found else None

  def problems(self):
    """What is not as promised."""
    others = [code for i, code in enumerate(self.codes) if i != self.told]
    limit, slowest = LIMIT[self.signal], max(self.seconds)
    waits = self.phase == 'start-up' and others  # for the one that has left, START_TIMEOUT long
    if slowest > limit and self.phase not in COMPILATION and not waits:
      yield f'left after {slowest:.0f} s, more than {limit}'
    if max(self.seconds) >= PATIENCE:
      yield 'hung'
    if self.finished:
      return  # all was done: however they leave
    if self.signal == 'KILL':
      if self.codes[self.told] != -signal.SIGKILL:
        yield f'the one that was killed left with {self.codes[self.told]}'
      if self.phase != 'start-up' and any(code != -signal.SIGABRT for code in others):
        yield f'others left with {others}'  # the launchers start a run again after this one alone
    elif set(self.codes) == {75}:
      if self.saved_at is None and self.phase in NOTHING_TO_SAVE:
        return
      if self.saved_at is None or self.saved_at != max(self.steps, default=None):
        yield f'says it saved at {self.saved_at}, and there are checkpoints of {self.steps}'
    elif self.phase != 'start-up':
      yield f'left with {self.codes}'


def arrivals(trace):
  """Places a process has come to, in order."""
  return trace.read_text().split('\n')[:-1] if trace.exists() else []


def phase_of(trace, half_written):
  """Where a process is, from its trace and from whether a checkpoint is half written."""
  been = arrivals(trace)
  last = been[-1] if been else ''
  if last in COMPILED and been.count(last) == 1:
    return 'compiling'
  phase = PHASES.get(last, 'training')
  return 'saving' if phase == 'training' and half_written else phase


def half_written(workdir):
  """Checkpoints that are being written, or were when a process died."""
  return {(path.name, path.stat().st_ino) for path in (workdir / 'checkpoints').glob('*tmp*')}


def complete(workdir):
  """Steps with a checkpoint, ascending."""
  names = [path.name for path in (workdir / 'checkpoints').glob('*')]
  return sorted(int(name) for name in names if name.isdigit())


def wait_for(processes, began, patience):
  """Seconds after `began` at which each one ended; who does not is made to say where it is."""
  ended = [None] * len(processes)
  while None in ended:
    for i, process in enumerate(processes):
      if ended[i] is None and process.poll() is not None:
        ended[i] = time.monotonic() - began
      elif ended[i] is None and time.monotonic() - began > patience:
        process.send_signal(signal.SIGABRT)  # the fault handler says where
        process.wait(timeout=60)
        ended[i] = patience
    time.sleep(0.02)
  return ended


def traces_of(setting, workdir):
  """Where each process of a run writes the places it comes to."""
  return [workdir.with_name(f'{workdir.name}.trace{i}') for i in range(setting.processes)]


def live(setting, workdir, moment=None, number='KILL', told=0):
  """One life of a run: (End or None where no signal was sent, codes, logs).

  Args:
    setting: see `Setting`.
    workdir: of the run.
    moment: when a signal is sent; None: never.
    number: its name.
    told: the process that gets it.
  """
  traces = traces_of(setting, workdir)
  for trace in traces:
    trace.unlink(missing_ok=True)
  before = half_written(workdir)
  began = time.monotonic()
  processes = setting.start(workdir, traces)
  sent, since = None, None
  while moment and any(process.poll() is None for process in processes):
    if since is None and moment.counts_from(traces[told]):
      since = time.monotonic() if moment.place else began
    if since is not None and time.monotonic() - since >= moment.seconds:
      if processes[told].poll() is None:
        phase = phase_of(traces[told], bool(half_written(workdir) - before))
        processes[told].send_signal(getattr(signal, f'SIG{number}'))
        sent = time.monotonic()
      break
    time.sleep(0.0005)  # an evaluation takes 3 ms
  patience = PATIENCE if sent else 600
  seconds = wait_for(processes, sent or began, patience)
  logs = [process.communicate()[1] for process in processes]
  codes = [process.returncode for process in processes]
  if sent is None:
    return None, codes, logs
  end = End(
    number,
    moment,
    told,
    phase,
    seconds,
    codes,
    logs,
    complete(workdir),
    (workdir / 'result.json').exists(),
  )
  return end, codes, logs


def end_state(workdir):
  """All of a finished run that must be reproducible, {name: value}; arrays as bytes."""
  config, lines, result = driver.records_of(workdir)
  del config['commit']
  found = {'config.json': config, 'metrics.jsonl': lines, 'result.json': result}
  for path in (workdir / 'splits.npz', *sorted((workdir / 'conflict').glob('*.npz'))):
    with np.load(path, allow_pickle=False) as arrays:
      for name in arrays.files:
        found[f'{path.name}:{name}'] = arrays[name].tobytes()
  for path in sorted((workdir / 'conflict').glob('*.json')):
    found[path.name] = json.loads(path.read_text())
  settings = driver.tiny_config()
  model = registry.build(settings.model, 10, (8, 8, 1))
  tx, _ = optimizers.build(settings, 1)
  like = state_lib.shapes(model, tx, (8, 8, 1))
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    for step in {complete(workdir)[-1], result['checkpoint_step']}:
      leaves, _ = jax.tree.flatten_with_path(checkpoints.restore(step, like.saved())[0])
      for path, leaf in leaves:
        found[f'checkpoint {step}{jax.tree_util.keystr(path)}'] = np.asarray(leaf).tobytes()
  return found


def differences(state, expected):
  """Names under which two end states are not the same, to the bit."""
  names = state.keys() | expected.keys()
  return sorted(
    name
    for name in names
    if name not in state or name not in expected or state[name] != expected[name]
  )


@dataclasses.dataclass(frozen=True)
class Reference:
  """A run that is left alone."""

  state: dict  # its end
  seconds: float  # that it takes
  turns: dict[str, int]  # how often it comes to each of AIMS


@dataclasses.dataclass
class Outcome:
  """What came of many ends of one setting by one signal."""

  setting: Setting
  signal: str
  reference: Reference
  seconds: float  # that a run takes from its start, when last seen
  ends: list[End] = dataclasses.field(default_factory=list)
  runs: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)


def undisturbed(setting, workdir):
  """The Reference of a setting."""
  began = time.monotonic()
  _, codes, logs = live(setting, workdir)
  if any(codes):
    raise RuntimeError(f'the undisturbed run left with {codes}:\n' + '\n'.join(logs))
  seconds, been = time.monotonic() - began, arrivals(traces_of(setting, workdir)[0])
  return Reference(end_state(workdir), seconds, {place: been.count(place) for place in AIMS})


def soak(setting, number, ends, seed, root, reference, say=print, until=float('inf')):
  """Runs of a setting that are ended by a signal so many times in all; an Outcome.

  Args:
    setting: see `Setting`.
    number: name of the signal.
    ends: how many.
    seed: decides the moments and the processes.
    root: folder of the runs; those with a problem stay there.
    reference: what `undisturbed` returned.
    say: takes a line for each end.
    until: time.monotonic() after which no further signal is sent.
  """
  outcome = Outcome(setting, number, reference, reference.seconds)
  rng = np.random.default_rng([seed, setting.processes, ord(number[0])])
  while len(outcome.ends) < ends and time.monotonic() < until:
    workdir = root / f'{setting.name}-{number}-{seed}-{outcome.runs}'
    outcome.runs += 1
    found = list(_one_run(outcome, rng, workdir, ends, until, say))
    if not found:
      found = [f'not the same: {name}' for name in differences(end_state(workdir), reference.state)]
      say(f'{workdir.name}: {found or "bit-identical"}')
    outcome.problems += [f'{workdir.name}: {problem}' for problem in found]
    if not found:
      shutil.rmtree(workdir)
  return outcome


def drawn(rng, outcome):
  """A random Moment: of the whole time, or of what a run does once it is compiled."""
  if rng.random() < 0.5:
    return Moment(rng.uniform(0, outcome.seconds))
  place = str(rng.choice(list(AIMS)))
  # of the first half: a run that was taken up again comes to fewer of them
  turn = int(rng.integers(1, outcome.reference.turns[place] // 2 + 1, endpoint=True))
  return Moment(rng.uniform(0, AIMS[place]), place, turn)


def _one_run(outcome, rng, workdir, ends, until, say):
  """Ends a run up to LIVES times and lets it finish; yields problems, which it is left with."""
  setting, saved_at = outcome.setting, None
  for remaining in range(LIVES, -1, -1):
    moment, told = drawn(rng, outcome), int(rng.integers(setting.processes))
    if not remaining or len(outcome.ends) >= ends or time.monotonic() > until:
      moment = None
    there, began = complete(workdir), time.monotonic()
    end, codes, logs = live(setting, workdir, moment, outcome.signal, told)
    if end:
      outcome.ends.append(end)
      say(
        f'{workdir.name}: SIG{end.signal} to process {told} {end.moment}, {end.phase};'
        f' left after {"  ".join(f"{s:.1f}" for s in end.seconds)} s'
        f' with {" ".join(map(str, codes))}; checkpoints {end.steps}'
        + (f', stopped at {end.saved_at}' if end.saved_at is not None else '')
      )
    problems = list(end.problems()) if end else []
    if not end and not there:
      outcome.seconds = time.monotonic() - began  # the machine may be calmer now, or less calm
    if not end and any(codes):
      problems.append(f'a life that was left alone left with {codes}')
    went_on = re.search(r'going on from the checkpoint at step (\d+)', logs[0])
    if went_on and int(went_on[1]) != there[-1]:
      problems.append(f'went on from {went_on[1]} where {there} are')
    if went_on and saved_at is not None and int(went_on[1]) != saved_at:
      problems.append(f'went on from {went_on[1]} though it had stopped at {saved_at}')
    if 'damaged' in logs[0]:
      problems.append('a checkpoint was damaged')
    if 'unchecked' in logs[0]:
      problems.append('a checkpoint had no sums')
    if problems:
      for i, log in enumerate(logs):
        workdir.with_name(f'{workdir.name}.log{i}').write_text(log)
      yield from (f'{problem} ({end.phase if end else "left alone"})' for problem in problems)
      return
    if end and end.saved_at is not None:
      saved_at = end.saved_at
    if (workdir / 'result.json').exists() and not end:
      return


def _size(setting):
  return f'{setting.processes} x {setting.devices} device{"s" if setting.devices > 1 else ""}'


def report(outcomes, about):
  """The summary, as Markdown."""
  lines = ['# Soak', '', *about, '']
  lines += [
    '| processes | signal | ends | runs | bit-identical | problems | to leave: median, max |'
  ]
  lines += ['| --- | --- | --- | --- | --- | --- | --- |']
  for o in outcomes:
    seconds = [max(end.seconds) for end in o.ends] or [0.0]
    wrong = {problem.split(':')[0] for problem in o.problems}
    lines.append(
      f'| {_size(o.setting)} | SIG{o.signal} | {len(o.ends)} '
      f'| {o.runs} | {o.runs - len(wrong)} | {len(o.problems)} '
      f'| {np.median(seconds):.1f} s, {max(seconds):.1f} s |'
    )
  lines += ['', 'Phase in which the signals came:', '']
  lines += ['| processes | signal | ' + ' | '.join(ORDER) + ' |']
  lines += ['| --- ' * (len(ORDER) + 2) + '|']
  for o in outcomes:
    count = collections.Counter(end.phase for end in o.ends)
    cells = ' | '.join(str(count[phase]) for phase in ORDER)
    lines.append(f'| {_size(o.setting)} | SIG{o.signal} | {cells} |')
  lines += ['', 'Exit codes (the process that got the signal; the other one), and how often:', '']
  for o in outcomes:
    codes = collections.Counter(
      '; '.join([str(e.codes[e.told]), *(str(c) for i, c in enumerate(e.codes) if i != e.told)])
      for e in o.ends
    )
    text = ', '.join(f'({code}) {n}' for code, n in codes.most_common())
    lines.append(f'- {_size(o.setting)}, SIG{o.signal}: {text}')
  problems = [problem for o in outcomes for problem in o.problems]
  lines += ['', 'Problems: none.' if not problems else 'Problems:', '']
  return '\n'.join(lines + [f'- {problem}' for problem in problems]).rstrip() + '\n'


def all_of(setting, numbers, ends, seed, root, until):
  """Outcomes of a setting, one for each signal; what time there is they share."""
  reference = undisturbed(setting, root / f'{setting.name}-undisturbed')
  print(f'{setting.name}: undisturbed {reference.seconds:.0f} s', flush=True)
  outcomes = []
  for i, number in enumerate(numbers):
    share = (until - time.monotonic()) / (len(numbers) - i)
    mine = time.monotonic() + share
    outcomes.append(soak(setting, number, ends, seed, root, reference, _say, mine))
  return outcomes


def _say(line):
  print(line, flush=True)


def main():
  options = dict(argument.removeprefix('--').split('=', 1) for argument in sys.argv[1:])
  ends, seed = int(options.get('ends', 20)), int(options.get('seed', 0))
  began, load = time.monotonic(), os.getloadavg()[2]
  until = began + float(options.get('minutes', 'inf')) * 60
  root = Path(options.get('keep') or tempfile.mkdtemp(prefix='soak'))
  root.mkdir(parents=True, exist_ok=True)
  os.environ['CSBA_CACHE_DIR'] = str(root / 'cache')
  os.environ['PYTHONFAULTHANDLER'] = '1'
  settings = [SETTINGS[name] for name in options.get('settings', 'one,two').split(',')]
  if 'epochs' in options:
    settings = [dataclasses.replace(setting, epochs=int(options['epochs'])) for setting in settings]
  numbers = options.get('signals', 'KILL,TERM').split(',')
  with concurrent.futures.ThreadPoolExecutor(len(settings)) as pool:
    found = pool.map(lambda setting: all_of(setting, numbers, ends, seed, root, until), settings)
    outcomes = [outcome for some in found for outcome in some]
  lengths = ', '.join(
    f'{o.seconds:.0f} s ({o.setting.epochs * driver.STEPS_PER_EPOCH} steps, {_size(o.setting)})'
    for o in outcomes
    if o.signal == numbers[0]
  )
  about = [
    f'`make soak`, seed {seed}: {(time.monotonic() - began) / 60:.0f} minutes. Undisturbed, a run '
    f'takes {lengths}.',
    f'{os.cpu_count()} CPU cores, mean load {load:.1f} before and {os.getloadavg()[2]:.1f} after; '
    f'Python {platform.python_version()}, jax {jax.__version__}.',
  ]
  text = report(outcomes, about)
  print(text)
  if 'out' in options:
    Path(options['out']).write_text(text)
  if any(o.problems for o in outcomes):
    print(f'soak.py: see {root}', file=sys.stderr)
    sys.exit(1)
  if 'keep' not in options:
    shutil.rmtree(root)


if __name__ == '__main__':
  main()
