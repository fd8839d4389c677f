"""ResNet-32 in PyTorch, layer for layer: the peer of csba_jax.models.resnet.

Layer names read `stage2/block1/conv1/kernel` there and `stage2.block1.conv1.weight` here.
"""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import torch_multibranch
from csba_jax.models import resnet


class Block(torch.nn.Module):
  """The twin of `resnet.Block`.   [N, C, H, W] -> [N, features, H/s, W/s]"""

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
      x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
    return F.relu(u + x, inplace=True)


class Net(torch.nn.Module):
  """The twin of `resnet.ResNet` for images of at most 32 pixels.   [N, ch, H, W] -> [N, C]"""

  def __init__(self, model: resnet.ResNet, channels: int = 3):
    super().__init__()
    width = model.stages[0]
    self.stem = torch.nn.Sequential()
    self.stem.add_module('full', torch_multibranch.ConvNormRelu(channels, width, (3, 3)))
    self.stages = []
    for i, features in enumerate(model.stages, 1):
      stage = torch.nn.Sequential()
      for j in range(1, model.blocks + 1):
        stride = 2 if i > 1 and j == 1 else 1
        stage.add_module(f'block{j}', Block(width, features, stride))
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
