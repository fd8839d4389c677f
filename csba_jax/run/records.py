"""What a run writes while it trains: metrics.jsonl, events and checkpoints, kept consistent."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csba_jax.errors import UserError
from csba_jax.gradients.conflict import Conflict
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.run.events import EventFile
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import Workdir, writing_to
from csba_jax.runtime import distributed
from csba_jax.runtime.progress import say


@dataclasses.dataclass
class Progress:
  """The part of a run's state that lives on the host; each checkpoint holds it."""

  step: int = 0
  best_step: int = 0
  best_score: float | None = None  # on the validation part at best_step; None before the first
  losses: list[float] = dataclasses.field(default_factory=list)  # since the last training line
  grad_norms: list[float] = dataclasses.field(default_factory=list)
  # what else the steps since then have shown, each a number or a list of numbers
  others: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
  metrics_bytes: int = 0  # length of metrics.jsonl
  done: list[str] = dataclasses.field(default_factory=list)  # tasks that are done after this step
  input: dict[str, Any] | None = None  # state of streamed inputs
  levels: list[str] = dataclasses.field(default_factory=list)  # loss levels reached so far
  origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # where a second stage began

  @classmethod
  def of(cls, meta: Any) -> 'Progress':
    """From what a checkpoint holds; UserError where another version wrote it, or it is damaged."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    if not isinstance(meta, Mapping):
      raise _unknown(f'{type(meta).__name__} in place of an object')
    if new := sorted(meta.keys() - fields.keys()):
      raise _unknown(f'{", ".join(new)}, which this version does not know')
    found = cls(**meta)
    for name, like in dataclasses.asdict(cls()).items():
      value = getattr(found, name)
      fits = value is None if like is None else type(value) is type(like)
      if not fits and not (like is None and isinstance(value, float | int | dict)):
        raise _unknown(f'{name} of type {type(value).__name__}')
    return found


def _unknown(found: str) -> UserError:
  return UserError(
    'a checkpoint whose progress this version of csba_jax wrote, or an earlier one',
    found,
    'use the version of csba_jax that config.json names, or train in another --workdir',
  )


class Records:
  """The records of a run: after a restart no line is missing and none is there twice.

  Use it as a context manager.
  """

  def __init__(self, folder: Workdir):
    self._folder = folder
    self._checkpoints = Checkpoints(folder.file('checkpoints'), warn=say)
    self._events: EventFile | None = None
    self.progress = Progress()
    # step and result of the last snapshot of this process: the tested net may be the last one
    self.measured: tuple[int, Mapping[str, Any]] = -1, {}

  def __enter__(self) -> 'Records':
    return self

  def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
    if self._events:
      self._events.close()
    self._checkpoints.__exit__(exc_type, *exc_info)

  def resume(self, initial: TrainState, origin: dict[str, Any]) -> TrainState:
    """The state of the newest whole checkpoint, or `initial`; removes lines of later steps.

    `origin` says where `initial` comes from; a resumed run keeps the origin of its start.
    """
    self.progress.origin = origin
    restored = self._checkpoints.restore_latest(initial.saved())
    if restored is not None:
      saved, meta = restored
      initial = TrainState.of_saved(saved)
      self.progress = Progress.of(meta)
      say(f'going on from the checkpoint at step {self.progress.step}')
    self._folder.rewind_metrics(self.progress.metrics_bytes)
    if not distributed.is_first():
      return initial
    with writing_to(self._folder.path):
      self._events = EventFile(self._folder.file('tensorboard'), self.progress.step)
    return initial

  def best(self, last: TrainState) -> TrainState:
    """The state with the best validation score; without validation, the last state."""
    if self.progress.best_step == self.progress.step:
      return last
    self._checkpoints.wait()
    try:
      return TrainState.of_saved(
        self._checkpoints.restore(self.progress.best_step, last.saved())[0]
      )
    except UserError as error:
      say(f'the best checkpoint is lost, testing the last step instead: {error}')
      self.progress.best_step, self.progress.best_score = self.progress.step, None
      return last

  def add(self, step: int, loss: np.ndarray, grad_norm: np.ndarray, **others: np.ndarray) -> None:
    """Adds the metrics of the steps that end at `step`, each [steps] or [steps, ...].

    Raises:
      UserError: one of them is not finite.
    """
    self.progress.step, self.progress.done = step, []
    for offset, pair in enumerate(zip(loss, grad_norm, strict=True), 1 - len(loss)):
      if not np.isfinite(pair).all():
        kept = self._checkpoints.steps()
        raise UserError(
          'a finite loss and gradient',
          f'loss {pair[0]}, gradient norm {pair[1]} in steps {step - len(loss) + 1} to {step}'
          f' (first at {step + offset})',
          'lower train.learning_rate; '
          + (
            f'the last good checkpoint is at step {kept[-1]}' if kept else 'nothing was saved yet'
          ),
        )
    self.progress.losses += [float(x) for x in loss]
    self.progress.grad_norms += [float(x) for x in grad_norm]
    for name, values in others.items():
      self.progress.others.setdefault(name, []).extend(np.asarray(values, float).tolist())

  def training_line(self, epoch: float, learning_rate: float, timing: dict[str, float]) -> None:
    """Writes the means over the steps since the last line."""
    record = {
      'train_loss': float(np.mean(self.progress.losses)),
      'grad_norm': float(np.mean(self.progress.grad_norms)),
      'learning_rate': learning_rate,
    }
    for name, values in self.progress.others.items():
      known = np.ma.masked_invalid(values).mean(0)
      record[name] = np.ma.filled(known, np.nan).tolist()
    self.progress.losses, self.progress.grad_norms, self.progress.others = [], [], {}
    self._write(epoch, record, timing)

  def validation_line(
    self, epoch: float, summary: dict[str, Any], score: float, seconds: float
  ) -> None:
    """Writes the validation metrics and keeps the best score; of equal scores, the latest."""
    names = ('loss', 'accuracy', 'macro_f1', 'balanced_accuracy')
    record = {f'val_{name}': summary[name] for name in names} | {'val_score': score}
    self._write(epoch, record, {'val_seconds': seconds})
    best = self.progress.best_score
    if best is None or score >= best:
      self.progress.best_score = score
      self.progress.best_step = self.progress.step

  def diagnostics_line(self, epoch: float, conflict: Conflict, seconds: float) -> None:
    """Writes the summary of the shared scope, and the whole conflict to a file in conflict/."""
    if not distributed.is_first():
      return
    path = self._folder.file(f'conflict/step{self.progress.step:06d}_probe.npz')
    with writing_to(path.parent):
      path.parent.mkdir(exist_ok=True)
      conflict.save(path)
    self._write(epoch, conflict.summary(), {'diagnostics_seconds': seconds})

  def surgery_line(self, epoch: float, record: dict[str, Any], seconds: float) -> None:
    """Writes what a measurement for gradient surgery found, and the weights that follow from it."""
    self._write(epoch, record, {'surgery_seconds': seconds})

  def snapshot_line(
    self,
    name: str,
    epoch: float,
    found: Mapping[str, tuple[Conflict, Mapping[str, Any]]],
    seconds: float,
  ) -> None:
    """Writes summaries of the shared scope, and the whole of each part to files in conflict/.

    `found` is {part: (conflict, branch similarity)}; `snapshot_file` names the files.
    """
    if not distributed.is_first():
      return
    folder = self._folder.file('conflict')
    line: dict[str, float] = {}
    with writing_to(folder):
      folder.mkdir(exist_ok=True)
      for part, (conflict, _) in found.items():
        conflict.save(folder / f'{snapshot_file(name, part)}.npz')
        line |= {f'{part}_{key}': value for key, value in conflict.summary().items()}
    for part, (_, branches) in found.items():
      self._folder.write_json(f'conflict/{snapshot_file(name, part)}.json', branches)
    self._write(epoch, line, {'diagnostics_seconds': seconds})

  def _write(self, epoch: float, record: dict[str, Any], timing: dict[str, float]) -> None:
    if not distributed.is_first():
      return
    step = self.progress.step
    self._folder.append_metrics({'step': step, 'epoch': epoch, **record, 'timing': timing})
    assert self._events is not None  # since `resume`
    with writing_to(self._folder.path):
      self._events.scalars(step, _scalars(record) | timing)
    self.progress.metrics_bytes = self._folder.metrics_length()

  def save(self, state: TrainState, score: float | None = None) -> None:
    """Starts to save a checkpoint of the state and of everything that a restart needs.

    Raises:
      UserError: the state is not finite (the loss would show that one step later), or the
        checkpoint cannot be written.
    """
    if not _finite(state.params):
      kept = self._checkpoints.steps()
      raise UserError(
        'finite parameters',
        f'NaN or infinity after step {self.progress.step}',
        f'lower train.learning_rate; the good checkpoints are of steps {kept}',
      )
    progress = dataclasses.asdict(self.progress)
    self._checkpoints.save(self.progress.step, state.saved(), progress, score)

  def wait(self) -> None:
    """Returns when the last checkpoint is on disk."""
    self._checkpoints.wait()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a record, those of a list under its name and their index."""
  found: dict[str, float] = {}
  for name, value in record.items():
    if isinstance(value, list):
      found |= {f'{name}/{i}': x for i, x in enumerate(value)}
    else:
      found[name] = value
  return found


TESTED = 'tested'  # name of the snapshot of the checkpoint that is evaluated on the test part


def snapshot_file(name: str, part: str) -> str:
  """Name of a snapshot's files without suffix: .npz holds the conflict, .json the rest."""
  return f'moment_{name.replace(" ", "-")}_{part}'


@jax.jit
def _finite(tree: Any) -> jax.Array:
  """Whether no number in the tree is NaN or infinite."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
