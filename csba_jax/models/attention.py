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


def hidden_units(channels: int, reduction: int) -> int:
  """Units between both layers of a gate: channels // reduction, but at least LEAST_HIDDEN.

  Never more than channels, which they are with reduction 1, as CSBA has it.
  """
  return max(channels // reduction, min(LEAST_HIDDEN, channels))


class ChannelGate(nn.Module):
  """Channel gate sigmoid(W2 relu(W1 z)), both layers with bias.   [N, D] -> [N, D] in (0, 1)

  The hidden layer has `hidden_units`. With reduction 1 and one gate a branch, CSBA is larger than
  its control by what the paper states (+32.6 %).
  """

  reduction: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array) -> Array:
    channels = z.shape[-1]
    hidden = hidden_units(channels, self.reduction)
    hidden = nn.Dense(hidden, dtype=self.dtype, name='squeeze')(z)
    return nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name='excite')(nn.relu(hidden)))


class BranchAttention(nn.Module):
  """CSBA: before aggregation the channels of each branch gate that branch, u_b * s_b(z_b).

  s_b = sigmoid(W2_b relu(W1_b z_b)), with separate weights for every branch; squeeze-excitation has
  one gate after the aggregation.
  [N, H, W, D] for each branch -> the same (Singhal & Soni, arXiv 2606.05740).
  """

  names: Sequence[str]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, branches: Sequence[Array]) -> list[Array]:
    gates = [
      ChannelGate(dtype=self.dtype, name=name)(u.mean((1, 2)))
      for name, u in zip(self.names, branches, strict=True)
    ]
    self.sow('intermediates', 'gates', jnp.stack(gates, axis=1))  # [N, B, D]
    return [u * s[:, None, None, :] for u, s in zip(branches, gates, strict=True)]


class SqueezeExcite(nn.Module):
  """One channel gate after aggregation, x * s(mean_hw x).   [N, H, W, C] -> [N, H, W, C]

  Hu et al. 2018, with their reduction of 16, which leaves at least 16 units in their nets; narrower
  nets keep 8 (`hidden_units`). It is the same in training and evaluation.
  """

  reduction: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    del train
    gate = ChannelGate(self.reduction, self.dtype, name='gate')(x.mean((1, 2)))
    return x * gate[:, None, None, :]


class CBAM(nn.Module):
  """Channel attention, then spatial attention, after aggregation.   [N, H, W, C] -> [N, H, W, C]

  x <- x * sigmoid(mlp(mean_hw x) + mlp(max_hw x)), with one mlp for both;
  x <- x * sigmoid(norm(conv7x7([mean_c x, max_c x])))  (Woo et al. 2018; norm and
  reduction 16 as in their code, and at least 8 hidden units, see `hidden_units`).
  """

  reduction: int = 16
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    channels = x.shape[-1]
    hidden = hidden_units(channels, self.reduction)
    squeeze = nn.Dense(hidden, dtype=self.dtype, name='squeeze')
    excite = nn.Dense(channels, dtype=self.dtype, name='excite')
    pooled = (x.mean((1, 2)), x.max((1, 2)))
    gate = nn.sigmoid(sum(excite(nn.relu(squeeze(z))) for z in pooled))
    x = x * gate[:, None, None, :]
    maps = jnp.stack([x.mean(-1), x.max(-1)], axis=-1)
    maps = layers.Conv(1, (7, 7), dtype=self.dtype, name='spatial')(maps)
    norm = layers.make_norm(self.norm, train, self.dtype, 'spatial_norm')
    return x * nn.sigmoid(norm(maps))


class ClassGate(nn.Module):
  """V_b relu(U_b z_b), the image's share of the class-conditioned gate.   [N, B, D] -> [N, B, D]

  V starts at zero, and so does E, the share of the class: the net starts exactly as plain CSBA.
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
  normalises: bool = False  # whether `after` takes norm, too: the kind of normalisation of the net
  # (dtype, name) -> module: z [N, B, D] -> the image's share of gates that the classifier applies
  # for every class
  at_classifier: Callable[..., nn.Module] | None = None
  # no attention, in a net that is widened to the parameter count of this other row
  parameters_of: str | None = None


ATTENTIONS: Mapping[str, Attention] = {
  'none': Attention(),
  'none_wide': Attention((BRANCHES,), parameters_of='csba'),
  'se': Attention((BRANCHES,), after=SqueezeExcite),
  'cbam': Attention((BRANCHES, MAPS), after=CBAM, normalises=True),
  'csba': Attention((BRANCHES,), before=BranchAttention),
  'csba_class': Attention((BRANCHES,), before=BranchAttention, at_classifier=ClassGate),
}


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
    attention: a row of ATTENTIONS.
    train: as of the module.
    dtype: type of the computation.
    project: [N, H, W, B * D] -> [N, H, W, features]; without it branches are concatenated only.
    norm: a row of layers.NORMS, for an attention that normalises.
  """
  row = ATTENTIONS[attention]
  if row.before is not None:
    branches = row.before(names, dtype=dtype, name='attention')(branches)
  module.sow('intermediates', 'branches', jnp.stack([u.mean((1, 2)) for u in branches], axis=1))
  x = jnp.concatenate(branches, axis=-1)
  if project is not None:
    x = project(x)
  if row.after is not None:
    kind = {'norm': norm} if row.normalises else {}
    x = row.after(dtype=dtype, name='attention', **kind)(x, train)
  return x
