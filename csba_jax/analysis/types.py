"""What a study's findings are made of: comparisons, claims, scores, matrices, flows, links."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis.stats import Estimate

# of one comparison, and of a link of the argument
SUPPORTED, REFUTED, UNDECIDED = 'supported', 'not supported', 'undecided'
UNTESTED = 'untested'  # of a link that was not put to a test
VERDICTS = (SUPPORTED, REFUTED, UNDECIDED, UNTESTED)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A treatment against a control, paired by unit (split, repeat, fold, seed)."""

  treatment: str
  control: str
  cell: Mapping[str, Any]  # what both have in common: method, ...; of conflict at, part, scope
  outcome: str  # 'macro-F1' and the like; of conflict the name of the measure
  treatment_mean: float
  control_mean: float
  difference: Estimate  # treatment - control
  adjusted_p: float = float('nan')  # Holm over the family; NaN outside it
  verdict: str = ''  # supported | not supported | undecided; '' where none is given
  limits: tuple[float, ...] = ()  # that the verdict holds the ends of the interval against
  missing: tuple[str, ...] = ()  # 'csba without seed 3': units that one side lacks
  # where the difference knows that units share images: as if they were independent, for comparison
  uncorrected: Estimate | None = None
  losses: tuple[float, float] | None = None  # of conflict: mean training losses of both sides
  seconds: tuple[float, float] | None = None  # of methods: median time of a run of both sides


@dataclasses.dataclass(frozen=True)
class Claim:
  """One link of the argument, with a verdict in plain words written from the numbers."""

  title: str  # 'CSBA helps', 'not by capacity alone', 'CSBA reduces conflict', ...
  verdict: str  # supported | not supported | undecided | untested
  sentences: tuple[str, ...]  # each with its numbers and intervals
  plain: str = ''  # the whole of it in one sentence, for a reader who knows no statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """One variant in one cell: test metrics over its units."""

  cell: Mapping[str, Any]
  variant: str
  parameters: int
  metrics: Mapping[str, Estimate]  # by name, the primary outcome first
  per_class_f1: Sequence[Estimate]  # [C]
  confusion: np.ndarray  # [C, C] summed over units; rows are true classes


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
  """A conflict matrix, the mean over units of the cosines (each mean over the defined ones)."""

  cell: Mapping[str, Any]
  variant: str
  at: str  # snapshot: '0', '0.1', '0.5', '1', 'loss 0.3'
  part: str  # train | val
  scope: str  # shared | common
  cosine: np.ndarray  # [C, C], NaN where never defined
  units: int


@dataclasses.dataclass(frozen=True, eq=False)
class MeanFlow:
  """Gradient flow of one variant at one snapshot, means over units."""

  cell: Mapping[str, Any]
  variant: str
  at: str
  part: str
  norms: np.ndarray  # [C]   |g_c| in the scope shared
  shares: np.ndarray  # [C]   pi_c <g_c, g> / |g|^2
  scopes: Mapping[str, Mapping[str, float]]  # stage1, branch3x3, ...: mean summaries
  loss: float  # mean loss over the part


@dataclasses.dataclass(frozen=True, eq=False)
class BranchSimilarity:
  """How alike the branches are, and how the gates differ by class; means over units."""

  cell: Mapping[str, Any]
  variant: str
  at: str
  part: str
  cka: Mapping[str, float]  # by block: mean over pairs of branches
  gate_spread: Mapping[str, float]  # by block; {} without gates
  gates: Mapping[str, np.ndarray]  # by block: mean gate of each branch by class, [B, C]


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
  """Conflict reduction against F1 gain, paired by unit within class.

  A variant against itself: less conflict against more F1 among its own runs, the noise floor.
  """

  treatment: str
  control: str
  cell: Mapping[str, Any]
  measure: str  # what is reduced, in words
  within: Estimate  # mean over classes of the correlation over units
  across: Estimate  # correlation over classes of the means over units
  reduction: np.ndarray  # [S, C]
  gain: np.ndarray  # [S, C]
  verdict: str  # '' of what is shown beside the claim and takes no part in it
  uncorrected: Estimate | None = None  # `within` as if units were independent, where they are not


@dataclasses.dataclass(frozen=True, eq=False)
class SizeGuide:
  """A measure of conflict in nets of several widths and depths, against the primary outcome."""

  variant: str
  cells: tuple[Mapping[str, Any], ...]  # the sizes
  at: str  # snapshot of the measure
  measure: str
  conflict: np.ndarray  # [sizes] mean over units
  outcome: np.ndarray  # [sizes] mean over units
  correlation: Estimate  # over sizes
