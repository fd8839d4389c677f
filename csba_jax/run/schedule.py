"""The steps at which a run logs, evaluates, saves, is measured and ends."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from csba_jax.config import step_at
from csba_jax.data import sampling
from csba_jax.errors import UserError, shown
from csba_jax.fields import numbers
from csba_jax.methods import second_stages


@dataclasses.dataclass(frozen=True)
class Plan:
  """When a run logs, evaluates, saves and is measured, and when it ends; in steps."""

  steps_per_epoch: int
  total: int
  log_every: int
  eval_every: int
  diagnose_every: int  # 0: never
  snapshots: tuple[tuple[str, int], ...] = ()  # (name: a share of the run, step)
  loss_levels: tuple[float, ...] = ()
  save_every: int = 1000
  frozen: int = 0  # steps in which the weights of model.init do not move
  surgery_every: int = 0  # steps between measurements for gradient surgery; 0: none

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, images: int) -> 'Plan':
    """The plan of a config for a training set of that many images; UserError for 2**31 steps."""
    train = config.train
    per_epoch = math.ceil(images / train.batch_size)
    stage = second_stages.find(config.stage, config.model.head)
    epochs = 0 if stage.trains is None else train.epochs
    if epochs * per_epoch >= 2**31:
      most = (2**31 - 1) // per_epoch
      raise UserError(
        f'train.epochs of at most {most}, so that steps are below 2**31',
        shown(epochs),
        f'set --config.train.epochs={most} or lower',
      )
    shares = numbers(config.diagnostics.snapshots)
    return cls(
      per_epoch,
      epochs * per_epoch,
      train.log_every,
      train.eval_every * per_epoch,
      config.diagnostics.every,
      tuple((f'{share:g}', step_at(share, epochs * per_epoch)) for share in shares),
      numbers(config.diagnostics.loss_levels),
      train.save_every,
      step_at(train.frozen, epochs * per_epoch),
      _surgery_every(config.surgery),
    )

  def segments(self, start: int) -> Iterator[tuple[int, int]]:
    """(first, last) steps of the segments between log lines; each epoch ends with a line too."""
    while start < self.total:
      epoch_start = start // self.steps_per_epoch * self.steps_per_epoch
      in_epoch = (start - epoch_start) // self.log_every * self.log_every + self.log_every
      end = epoch_start + min(in_epoch, self.steps_per_epoch)
      yield start, end
      start = end

  def dispatches(self, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
    """(first, last) steps of the compiled calls of a segment, of at most `longest` steps.

    A call ends at each step after which something is measured or saved, or frozen weights move.
    """
    stops = (self.frozen, *(step for _, step in self.snapshots))
    while first < last:
      end = min(first + longest, last, *(step for step in stops if step > first))
      end = min(end, (first // self.save_every + 1) * self.save_every)
      for every in (self.diagnose_every, self.surgery_every):
        if every:
          end = min(end, (first // every + 1) * every)
      yield first, end
      first = end

  def diagnoses_at(self, step: int) -> bool:
    """Whether the conflict is measured after step number `step`."""
    return self.diagnose_every > 0 and step > 0 and step % self.diagnose_every == 0

  def surgery_at(self, step: int) -> bool:
    """Whether the weights of gradient surgery are chosen anew for the steps after this number."""
    every = self.surgery_every
    return every > 0 and self.frozen <= step < self.total and step % every == 0

  def snapshots_at(self, step: int) -> list[str]:
    """Names of the snapshots to take after step number `step`."""
    return [name for name, due in self.snapshots if due == step]

  def levels_at(self, loss: float, known: Sequence[str]) -> list[str]:
    """Names of the loss levels that a loss has reached, without those that are known."""
    names = [f'loss {level:g}' for level in self.loss_levels if loss <= level]
    return [name for name in names if name not in known]

  def epoch(self, step: int) -> float:
    """Number of epochs after `step` steps."""
    return step / self.steps_per_epoch

  def logs_at(self, step: int) -> bool:
    """Whether a log line follows step number `step`."""
    in_epoch = step % self.steps_per_epoch
    return step > 0 and in_epoch % self.log_every == 0

  def evaluates_at(self, step: int) -> bool:
    """Whether a validation follows step number `step`; after step 0 only without training."""
    return step == self.total or (step > 0 and step % self.eval_every == 0)

  def saves_at(self, step: int) -> bool:
    """Whether a checkpoint follows step number `step`."""
    return self.evaluates_at(step) or (step > 0 and step % self.save_every == 0)


def _surgery_every(surgery: ml_collections.ConfigDict) -> int:
  """Steps between measurements outside of the compiled step."""
  # the controls `fixed` and `random` measure nothing (csba_jax.methods.surgery, which needs JAX)
  measures = surgery.name not in ('none', 'fixed', 'random') and surgery.every > 1
  return surgery.every if measures else 0


def training_stream(config: ml_collections.ConfigDict, labels: np.ndarray) -> sampling.Stream:
  """The stream of batches that a run trains on, for the labels [N] of its training images.

  Raises:
    UserError: see `sampling.Stream.of`.
  """
  total = Plan.of(config, len(labels)).total
  return sampling.Stream.of(config.sampler, labels, config.train.batch_size, total, config.seed)
