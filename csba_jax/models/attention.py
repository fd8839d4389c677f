"""Attention over the channels of parallel branches: CSBA, its class-conditioned form, SE and CBAM.

Notation: branch b of a block gives u_b [N, H, W, D]; z_b = mean over H, W of u_b, [N, D].
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from csba_jax.models import layers


class ChannelGate(nn.Module):
  """Channel gate sigmoid(W2 relu(W1 z)), both layers with bias.   [N, D] -> [N, D] in (0, 1)

  The hidden layer has D // reduction units, at least one. With reduction 1 a gate for each branch
  makes CSBA as much larger than its control as the paper states (+32.6 %).
  """

  reduction: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array) -> Array:
    channels = z.shape[-1]
    hidden = nn.Dense(max(1, channels // self.reduction), dtype=self.dtype, name='squeeze')(z)
    return nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name='excite')(nn.relu(hidden)))


class BranchAttention(nn.Module):
  """CSBA: each branch is gated by its own channels before aggregation, u_b * s_b(z_b).

  s_b = sigmoid(W2_b relu(W1_b z_b)) with weights of its own for every branch, where
  squeeze-excitation has one gate after the branches have met.
  [N, H, W, D] per branch -> the same (Singhal & Soni, arXiv 2606.05740).
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

  Hu et al. 2018, with their reduction of 16.
  """

  reduction: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return (
      x * ChannelGate(self.reduction, self.dtype, name='gate')(x.mean((1, 2)))[:, None, None, :]
    )


class CBAM(nn.Module):
  """Channel, then spatial attention after aggregation.   [N, H, W, C] -> [N, H, W, C]

  x <- x * sigmoid(mlp(mean_hw x) + mlp(max_hw x)), one mlp for both;
  x <- x * sigmoid(norm(conv7x7([mean_c x, max_c x])))  (Woo et al. 2018; norm and
  reduction 16 as in their code).
  """

  reduction: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    channels = x.shape[-1]
    squeeze = nn.Dense(max(1, channels // self.reduction), dtype=self.dtype, name='squeeze')
    excite = nn.Dense(channels, dtype=self.dtype, name='excite')
    pooled = (x.mean((1, 2)), x.max((1, 2)))
    gate = nn.sigmoid(sum(excite(nn.relu(squeeze(z))) for z in pooled))
    x = x * gate[:, None, None, :]
    maps = jnp.stack([x.mean(-1), x.max(-1)], axis=-1)
    maps = layers.Conv(1, (7, 7), dtype=self.dtype, name='spatial')(maps)
    norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='spatial_norm')
    return x * nn.sigmoid(norm(maps))


def aggregate(
  module: nn.Module,
  branches: Sequence[Array],
  names: Sequence[str],
  attention: str,
  train: bool,
  dtype: Any,
  project: Callable[[Array], Array] | None = None,
) -> Array:
  """attention(project(concat_b u_b)), or project(concat_b attention(u_b)) for CSBA.

  What each `attention` means in every model: `csba` and `csba_class` gate the branches before they
  are aggregated, `se` and `cbam` what comes out, the others nothing. Where `intermediates` are
  asked for, the module keeps `branches` [N, B, D], the means over space of what is aggregated.

  Args:
    module: in whose `@nn.compact` method it is called; gets the submodule `attention`.
    branches: u_b [N, H, W, D], B of them.
    names: of the branches; CSBA's layers are called by them.
    attention: none | none_wide | se | cbam | csba | csba_class.
    train: as of the module.
    dtype: type of the computation.
    project: [N, H, W, B * D] -> [N, H, W, features]; without it they are concatenated only.
  """
  if attention in ('csba', 'csba_class'):
    branches = BranchAttention(names, dtype, name='attention')(branches)
  module.sow('intermediates', 'branches', jnp.stack([u.mean((1, 2)) for u in branches], axis=1))
  x = jnp.concatenate(branches, axis=-1)
  if project is not None:
    x = project(x)
  if attention == 'se':
    x = SqueezeExcite(dtype=dtype, name='attention')(x)
  if attention == 'cbam':
    x = CBAM(dtype=dtype, name='attention')(x, train)
  return x


class ClassGate(nn.Module):
  """The image's share V_b relu(U_b z_b) of the class-conditioned gate.   [N, B, D] -> [N, B, D]

  V starts at zero, and so does the class's share E: the net starts as plain CSBA exactly.
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
