"""When things happen in a run, in steps."""

import dataclasses
import math
from collections.abc import Iterator

import ml_collections

from csba_jax import stages


def step_at(share: float, total_steps: int) -> int:
  """First step of which `share` of the run lies behind; one whole number for host and device."""
  return math.ceil(share * total_steps - 1e-6)


@dataclasses.dataclass(frozen=True)
class Plan:
  """When a run logs, evaluates and is diagnosed, and when it ends."""

  steps_per_epoch: int
  total: int
  log_every: int
  eval_every: int
  diagnose_every: int  # 0: never

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, images: int) -> 'Plan':
    """The plan of a config for a training set of that many images."""
    train = config.train
    per_epoch = math.ceil(images / train.batch_size)
    stage = stages.find(config.stage, config.model.head)
    epochs = 0 if stage.trains is None else train.epochs
    return cls(
      per_epoch,
      epochs * per_epoch,
      train.log_every,
      train.eval_every * per_epoch,
      config.diagnostics.every,
    )

  def segments(self, start: int) -> Iterator[tuple[int, int]]:
    """(from, to) of the stretches between log lines; a line also ends each epoch."""
    while start < self.total:
      epoch_start = start // self.steps_per_epoch * self.steps_per_epoch
      in_epoch = (start - epoch_start) // self.log_every * self.log_every + self.log_every
      end = epoch_start + min(in_epoch, self.steps_per_epoch)
      yield start, end
      start = end

  def dispatches(self, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
    """(from, to) of the calls of a segment; one ends at each step that is diagnosed."""
    while first < last:
      end = min(first + longest, last)
      if self.diagnose_every:
        end = min(end, (first // self.diagnose_every + 1) * self.diagnose_every)
      yield first, end
      first = end

  def diagnoses_at(self, step: int) -> bool:
    """Whether the conflict is measured after step number `step`."""
    return self.diagnose_every > 0 and step % self.diagnose_every == 0

  def epoch(self, step: int) -> float:
    """Epochs done after `step` steps."""
    return step / self.steps_per_epoch

  def evaluates_at(self, step: int) -> bool:
    """Whether a validation and a checkpoint follow step number `step`."""
    return step % self.eval_every == 0 or step == self.total
