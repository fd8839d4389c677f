"""Attention over the channels of parallel branches, in one visible table: CSBA, SE, CBAM.

Notation: branch b of a block gives u_b [N, H, W, D]; z_b = mean over H, W of u_b, [N, D].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from csba_jax.models import layers

LEAST_HIDDEN = 8  # units of a bottleneck: narrow nets would have one or two of them
IDENTITY, HALF = GATES = ('identity', 'half')  # values of config.model.gate: how gates start


def hidden_units(channels: int, reduction: int) -> int:
  """Units between both layers of a gate: channels // reduction, but at least LEAST_HIDDEN.

  Never more than channels, which they are with reduction 1, as CSBA has it.
  """
  return max(channels // reduction, min(LEAST_HIDDEN, channels))


def gate_layer(features: int, gate: str, dtype: Any, name: str) -> nn.Dense:
  """The last layer of a gate. It starts at zero where the gate starts as the identity."""
  init = nn.initializers.zeros if gate == IDENTITY else nn.initializers.lecun_normal()
  return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def squash(x: Array, gate: str) -> Array:
  """2 sigmoid(x), which is 1 at 0, for gates that start as the identity; else sigmoid(x)."""
  return 2 * nn.sigmoid(x) if gate == IDENTITY else nn.sigmoid(x)


class ChannelGate(nn.Module):
  """Channel gate 2 sigmoid(W2 relu(W1 z)), both layers with bias.   [N, D] -> [N, D] in (0, 2)

  The hidden layer has `hidden_units`. With reduction 1 and one gate a branch, CSBA is larger than
  its control by what the paper states (+32.6 %). W2 and its bias start at zero, so that the gate is
  1 and the net starts as the one without attention. With `gate` 'half' it is sigmoid(W2 relu(W1 z))
  with a random W2: near 0.5 at first, so that it halves what it acts on.
  """

  reduction: int = 1
  dtype: Any = jnp.float32
  gate: str = IDENTITY

  @nn.compact
  def __call__(self, z: Array) -> Array:
    channels = z.shape[-1]
    hidden = hidden_units(channels, self.reduction)
    hidden = nn.Dense(hidden, dtype=self.dtype, name='squeeze')(z)
    excite = gate_layer(channels, self.gate, self.dtype, 'excite')
    return squash(excite(nn.relu(hidden)), self.gate)


class BranchAttention(nn.Module):
  """CSBA: before aggregation the channels of each branch gate that branch, u_b * s_b(z_b).

  s_b is the `ChannelGate` of z_b, with separate weights for every branch; squeeze-excitation has
  one gate after the aggregation.
  [N, H, W, D] for each branch -> the same (Singhal & Soni, arXiv 2606.05740).
  """

  names: Sequence[str]
  dtype: Any = jnp.float32
  gate: str = IDENTITY

  @nn.compact
  def __call__(self, branches: Sequence[Array]) -> list[Array]:
    gates = [
      ChannelGate(dtype=self.dtype, gate=self.gate, name=name)(u.mean((1, 2)))
      for name, u in zip(self.names, branches, strict=True)
    ]
    self.sow('intermediates', 'gates', jnp.stack(gates, axis=1))  # [N, B, D]
    return [u * s[:, None, None, :] for u, s in zip(branches, gates, strict=True)]


class HalvedBranches(nn.Module):
  """u_b / 2, and nothing to learn: what the old start of CSBA did before it had learned anything.

  [N, H, W, D] for each branch -> the same. A control: a result of `half` needs no attention.
  """

  names: Sequence[str]
  dtype: Any = jnp.float32

  def __call__(self, branches: Sequence[Array]) -> list[Array]:
    """The branches, each times 0.5."""
    return [u * 0.5 for u in branches]


class SqueezeExcite(nn.Module):
  """One channel gate after aggregation, x * s(mean_hw x).   [N, H, W, C] -> [N, H, W, C]

  Hu et al. 2018, with their reduction of 16, which leaves at least 16 units in their nets; narrower
  nets keep 8 (`hidden_units`). It is the same in training and evaluation.
  """

  reduction: int = 16
  dtype: Any = jnp.float32
  gate: str = IDENTITY

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    del train
    gate = ChannelGate(self.reduction, self.dtype, self.gate, name='gate')(x.mean((1, 2)))
    return x * gate[:, None, None, :]


class CBAM(nn.Module):
  """Channel attention, then spatial attention, after aggregation.   [N, H, W, C] -> [N, H, W, C]

  x <- x * s(mlp(mean_hw x) + mlp(max_hw x)), with one mlp for both;
  x <- x * s(norm(conv7x7([mean_c x, max_c x])))  (Woo et al. 2018; norm and
  reduction 16 as in their code, and at least 8 hidden units, see `hidden_units`).
  s is 2 sigmoid, and the last layer of the mlp and the norm's scale start at zero: at first the net
  is the one without attention. With `gate` 'half', s is sigmoid, as in the paper, and both
  start as other layers do.
  """

  reduction: int = 16
  dtype: Any = jnp.float32
  norm: str = 'batch'
  gate: str = IDENTITY

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    channels = x.shape[-1]
    hidden = hidden_units(channels, self.reduction)
    squeeze = nn.Dense(hidden, dtype=self.dtype, name='squeeze')
    excite = gate_layer(channels, self.gate, self.dtype, 'excite')
    pooled = (x.mean((1, 2)), x.max((1, 2)))
    gate = squash(sum(excite(nn.relu(squeeze(z))) for z in pooled), self.gate)
    x = x * gate[:, None, None, :]
    maps = jnp.stack([x.mean(-1), x.max(-1)], axis=-1)
    maps = layers.Conv(1, (7, 7), dtype=self.dtype, name='spatial')(maps)
    scale = 0.0 if self.gate == IDENTITY else 1.0
    norm = layers.make_norm(self.norm, train, self.dtype, 'spatial_norm', scale)
    return x * squash(norm(maps), self.gate)


class ClassGate(nn.Module):
  """V_b relu(U_b z_b), the image's share of the class-conditioned gate.   [N, B, D] -> [N, B, D]

  V starts at zero, and so does E, the share of the class: the net starts exactly as plain CSBA,
  whatever model.gate is.
  """

  reduction: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array) -> Array:
    _, branches, channels = z.shape
    hidden = max(1, channels // self.reduction)
    per_branch = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', batch_axis=(0,)
    )
    u = self.param('squeeze', per_branch, (branches, channels, hidden)).astype(self.dtype)
    v = self.param('excite', nn.initializers.zeros, (branches, hidden, channels)).astype(self.dtype)
    return jnp.einsum('nbh,bhd->nbd', nn.relu(jnp.einsum('nbd,bdh->nbh', z, u)), v)


BRANCHES, MAPS = 'branches', 'image maps'  # what an attention may need of a net


class Attention(NamedTuple):
  """A row of ATTENTIONS: what acts on the branches of a net before or after the aggregation."""

  needs: tuple[str, ...] = ()  # BRANCHES that meet in `aggregate`; MAPS, axes of height and width
  # (names of branches, dtype, name) -> module: [u_b] -> [u_b], before the aggregation
  before: Callable[..., nn.Module] | None = None
  # (dtype, name) -> module: (x, train) -> x, after the aggregation; a row has one of the two
  after: Callable[..., nn.Module] | None = None
  gated: bool = False  # whether either takes gate, too: how its gates start
  normalises: bool = False  # whether `after` takes norm, too: the kind of normalisation of the net
  # (dtype, name) -> module: z [N, B, D] -> the image's share of gates that the classifier applies
  # for every class
  at_classifier: Callable[..., nn.Module] | None = None
  # no attention, in a net that is widened to the parameter count of this other row
  parameters_of: str | None = None


ATTENTIONS: Mapping[str, Attention] = {
  'none': Attention(),
  'none_wide': Attention((BRANCHES,), parameters_of='csba'),
  'half': Attention((BRANCHES,), before=HalvedBranches),
  'se': Attention((BRANCHES,), after=SqueezeExcite, gated=True),
  'cbam': Attention((BRANCHES, MAPS), after=CBAM, gated=True, normalises=True),
  'csba': Attention((BRANCHES,), before=BranchAttention, gated=True),
  'csba_class': Attention((BRANCHES,), before=BranchAttention, gated=True, at_classifier=ClassGate),
}


def with_gate(attention: str, gate: str) -> str:
  """The name by which a net knows an attention and the start of its gates: csba, or csba/half."""
  return f'{attention}/{gate}' if ATTENTIONS[attention].gated and gate != IDENTITY else attention


def find(attention: str) -> tuple[Attention, str]:
  """The row of ATTENTIONS, and the start of its gates, that a name of `with_gate` means."""
  kind, _, gate = attention.partition('/')
  return ATTENTIONS[kind], gate or IDENTITY


def aggregate(
  module: nn.Module,
  branches: Sequence[Array],
  names: Sequence[str],
  attention: str,
  train: bool,
  dtype: Any,
  project: Callable[[Array], Array] | None = None,
  norm: str = 'batch',
) -> Array:
  """after(project(concat_b before(u_b))), with `before` and `after` of the attention's row.

  Every model calls it where its branches meet, so an attention means the same in all of them. If
  the caller of the net asks for `intermediates`, the module keeps `branches` [N, B, D]: the means
  over space of the branches as they are aggregated.

  Args:
    module: it is called in the `@nn.compact` method of this module, which gets a submodule
      `attention`.
    branches: u_b [N, H, W, D], B of them.
    names: names of the branches; attention before the aggregation names its layers after them.
    attention: a name of `with_gate`.
    train: as of the module.
    dtype: type of the computation.
    project: [N, H, W, B * D] -> [N, H, W, features]; without it branches are concatenated only.
    norm: a row of layers.NORMS, for an attention that normalises.
  """
  row, gate = find(attention)
  kind = {'gate': gate} if row.gated else {}
  if row.before is not None:
    branches = row.before(names, dtype=dtype, name='attention', **kind)(branches)
  module.sow('intermediates', 'branches', jnp.stack([u.mean((1, 2)) for u in branches], axis=1))
  x = jnp.concatenate(branches, axis=-1)
  if project is not None:
    x = project(x)
  if row.after is not None:
    kind |= {'norm': norm} if row.normalises else {}
    x = row.after(dtype=dtype, name='attention', **kind)(x, train)
  return x
