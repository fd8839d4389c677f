"""The multi-branch net in PyTorch, layer for layer: a peer in benchmarks/training_sides.py."""

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from csba_jax.models import multibranch


class ConvNormRelu(nn.Module):
  """relu(norm(conv(x))), channels last in memory."""

  def __init__(self, channels: int, features: int, kernel_size: tuple[int, int]):
    super().__init__()
    padding = tuple(k // 2 for k in kernel_size)
    self.conv = nn.Conv2d(channels, features, kernel_size, padding=padding, bias=False)
    self.norm = nn.BatchNorm2d(features)  # momentum 0.1 here is 0.9 in Flax; epsilon 1e-5

  def forward(self, x):
    return F.relu(self.norm(self.conv(x)), inplace=True)


class Gate(nn.Module):
  """u * 2 sigmoid(W2 relu(W1 mean(u))): the gate that starts as the identity."""

  def __init__(self, features: int):
    super().__init__()
    self.squeeze = nn.Linear(features, features)
    self.excite = nn.Linear(features, features)

  def forward(self, u):
    gate = 2 * torch.sigmoid(self.excite(F.relu(self.squeeze(u.mean((2, 3))))))
    return u * gate[:, :, None, None]


class Block(nn.Module):
  """Three branches, gated for `csba`, concatenated, projected unless it is the last."""

  def __init__(self, channels: int, features: int, attention: str, project: bool):
    super().__init__()
    self.branch1x1 = ConvNormRelu(channels, features, (1, 1))
    self.branch3x3 = ConvNormRelu(channels, features, (3, 3))
    self.branch5x5 = nn.Sequential()
    self.branch5x5.add_module('row', ConvNormRelu(channels, features, (1, 5)))
    self.branch5x5.add_module('column', ConvNormRelu(features, features, (5, 1)))
    if attention == 'csba':
      self.attention = nn.ModuleDict({name: Gate(features) for name in multibranch.BRANCHES})
    self.project = ConvNormRelu(3 * features, features, (1, 1)) if project else None

  def forward(self, x):
    branches = [getattr(self, name)(x) for name in multibranch.BRANCHES]
    if hasattr(self, 'attention'):
      gates = self.attention.values()
      branches = [gate(u) for gate, u in zip(gates, branches, strict=True)]
    x = torch.cat(branches, 1)
    return x if self.project is None else self.project(x)


class Net(nn.Module):
  """The twin of `multibranch.MultiBranch` for 32x32 images and attention `none` or `csba`."""

  def __init__(self, model: multibranch.MultiBranch, channels: int = 3):
    super().__init__()
    self.stem = nn.Sequential()
    self.stem.add_module('full', ConvNormRelu(channels, model.stem, (3, 3)))
    width, self.stages = model.stem, []
    for i, (features, blocks) in enumerate(zip(model.stages, multibranch.BLOCKS, strict=True), 1):
      stage = nn.Sequential()
      for j in range(1, blocks + 1):
        last = i == len(model.stages) and j == blocks
        stage.add_module(f'block{j}', Block(width, features, model.attention, not last))
        width = features
      self.add_module(f'stage{i}', stage)
      self.stages.append(stage)
    self.head = nn.Linear(3 * width, model.num_classes)

  def forward(self, x):
    x = self.stem(x)
    for stage in self.stages:
      x = stage(F.max_pool2d(x, 2))
    return self.head(x.mean((2, 3)))


def from_flax(tree) -> dict[str, torch.Tensor]:
  """Parameters (or gradients) of the Flax net under the names and in the layout of the twin."""
  found = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    *names, kind = (key.key for key in path)
    value = np.asarray(leaf)
    if kind == 'kernel' and names == ['head']:
      value = value.reshape(-1, value.shape[-1]).T
    elif kind == 'kernel':
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    found['.'.join([*names, 'bias' if kind == 'bias' else 'weight'])] = torch.tensor(value.copy())
  return found


def optimizer(net: Net, train) -> torch.optim.SGD:
  """config.train's SGD: Nesterov, no weight decay on norms and biases."""
  decayed = [p for n, p in net.named_parameters() if n.endswith('weight') and 'norm' not in n]
  others = [p for n, p in net.named_parameters() if not n.endswith('weight') or 'norm' in n]
  groups = [{'params': decayed, 'weight_decay': train.weight_decay}, {'params': others}]
  return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=True)
