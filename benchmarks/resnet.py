"""CIFAR ResNet of 6n + 2 layers (He et al. 2016) in Flax, and its PyTorch twin.

ResNet-32 is n = 5 with 16, 32 and 64 channels: 464,154 parameters at 10 classes. Layer names read
`stage2/block1/conv1/kernel` here and `stage2.block1.conv1.weight` there.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import Array

from benchmarks import torch_multibranch
from csba_jax.models import layers

BLOCKS, STAGES = 5, (16, 32, 64)  # blocks of each stage, channels of the stages: ResNet-32


class Block(nn.Module):
  """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))).   [N, H, W, C] -> [N, H/s, W/s, features]

  Shortcut of option A: every s-th pixel, and zeros for the new channels; no parameters.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    def norm(name):
      return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

    u = layers.Conv(self.features, (3, 3), self.stride, self.dtype, name='conv1')(x)
    u = nn.relu(norm('norm1')(u))
    u = norm('norm2')(layers.Conv(self.features, (3, 3), dtype=self.dtype, name='conv2')(u))
    shortcut = x[:, :: self.stride, :: self.stride]
    new = self.features - x.shape[-1]
    return nn.relu(u + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new))))


class Stage(nn.Module):
  """`blocks` blocks of one width, the first with the stride.   [N, H, W, C] -> [N, H/s, W/s, D]"""

  features: int
  blocks: int
  stride: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for j in range(1, self.blocks + 1):
      stride = self.stride if j == 1 else 1
      x = Block(self.features, stride, self.dtype, name=f'block{j}')(x, train)
    return x


class ResNet(nn.Module):
  """Stem, three stages of strides 1, 2, 2, global mean, linear head.   [N, H, W, ch] -> [N, C]"""

  num_classes: int
  blocks: int = BLOCKS
  stages: tuple[int, ...] = STAGES
  dtype: Any = jnp.float32

  head = r'^head/'

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    stem = layers.ConvNormRelu(self.stages[0], (3, 3), dtype=self.dtype, name='stem')
    x = stem(x.astype(self.dtype), train)
    for i, features in enumerate(self.stages, 1):
      stride = 1 if i == 1 else 2
      x = Stage(features, self.blocks, stride, self.dtype, name=f'stage{i}')(x, train)
    return nn.Dense(self.num_classes, name='head')(x.mean((1, 2)).astype(jnp.float32))


class TorchBlock(torch.nn.Module):
  """The twin of `Block`.   [N, C, H, W] -> [N, features, H/s, W/s]"""

  def __init__(self, channels: int, features: int, stride: int):
    super().__init__()
    self.conv1 = torch.nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
    self.norm1 = torch.nn.BatchNorm2d(features)
    self.conv2 = torch.nn.Conv2d(features, features, 3, padding=1, bias=False)
    self.norm2 = torch.nn.BatchNorm2d(features)
    self.stride, self.new = stride, features - channels

  def forward(self, x):
    u = F.relu(self.norm1(self.conv1(x)), inplace=True)
    u = self.norm2(self.conv2(u))
    if self.stride > 1:
      x = x[:, :, :: self.stride, :: self.stride]
    if self.new:
      x = F.pad(x, (0, 0, 0, 0, 0, self.new))
    return F.relu(u + x, inplace=True)


class TorchNet(torch.nn.Module):
  """The twin of `ResNet`.   [N, ch, H, W] -> [N, C]"""

  def __init__(self, model: ResNet, channels: int = 3):
    super().__init__()
    width = model.stages[0]
    self.stem = torch_multibranch.ConvNormRelu(channels, width, (3, 3))
    self.stages = []
    for i, features in enumerate(model.stages, 1):
      stage = torch.nn.Sequential()
      for j in range(1, model.blocks + 1):
        stride = 2 if i > 1 and j == 1 else 1
        stage.add_module(f'block{j}', TorchBlock(width, features, stride))
        width = features
      self.add_module(f'stage{i}', stage)
      self.stages.append(stage)
    self.head = torch.nn.Linear(width, model.num_classes)

  def forward(self, x):
    x = self.stem(x)
    for stage in self.stages:
      x = stage(x)
    return self.head(x.mean((2, 3)))


def state_from_flax(variables) -> dict[str, torch.Tensor]:
  """Parameters and running statistics under the names and in the layout of the twin.

  It fits the multi-branch twin too; load it with strict=False, which leaves the counters of
  batches alone.
  """
  found = torch_multibranch.from_flax(variables['params'])
  for path, leaf in jax.tree.leaves_with_path(variables['batch_stats']):
    *names, kind = (key.key for key in path)
    found['.'.join([*names, f'running_{kind}'])] = torch.tensor(np.array(leaf))
  return found
