"""Weights of nets that others have trained on ImageNet: which file names are which variables.

Files are safetensors, with the names of torchvision or timm; `csba-convert-weights` makes one from
a file of PyTorch. Nothing in them is executed.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.models import efficientnet_lite, resnet_imagenet

PyTree = Any
FRESH = r'^head/|/attention/|^class_gate/'  # parameters that no file has: they start anew
IN_FOLDER = 'model.safetensors'
WHITE = 255.0  # the largest value of a pixel


class Source(NamedTuple):
  """A row of PRETRAINED.

  Attributes:
    torch_names: 'params/stem/conv/kernel' -> possible names in a file; none for a fresh variable.
    mean: of each channel of the pixels in 0..1 that the net was trained on.
    deviation: of each channel, by which they were divided.
    has: one of these tensors is in every file of the net.
    lacks: none of these is, though larger nets of the same kind have them.
  """

  torch_names: Callable[[str], tuple[str, ...]]
  mean: tuple[float, ...]
  deviation: tuple[float, ...]
  has: tuple[str, ...]
  lacks: tuple[str, ...] = ()


_LITE = (127 / WHITE,) * 3, (128 / WHITE,) * 3
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESNET18 = Source(
  resnet_imagenet.torch_names,
  *_IMAGENET,
  ('layer4.1.bn2.weight',),
  ('layer4.2.bn2.weight', 'layer1.0.bn3.weight'),
)
_RESNET50 = Source(
  resnet_imagenet.torch_names, *_IMAGENET, ('layer3.5.bn3.weight',), ('layer3.6.bn3.weight',)
)
_LITE0 = Source(
  efficientnet_lite.torch_names,
  *_LITE,
  ('_blocks.15._bn2.weight', 'blocks.6.0.bn3.weight'),
  ('_blocks.16._bn2.weight', 'blocks.1.2.bn3.weight', 'blocks.0.0.se.conv_reduce.weight'),
)
PRETRAINED: Mapping[str, Source] = {
  'resnet18': _RESNET18,
  'resnet50': _RESNET50,
  'efficientnet_lite0': _LITE0,
  'resnet18_branches': _RESNET18,
  'resnet50_branches': _RESNET50,
  'efficientnet_lite0_branches': _LITE0,
}


def check(model: ml_collections.ConfigDict, channels: int) -> None:
  """Raises UserError unless config.model can start from a file, with images of so many channels."""
  if model.name not in PRETRAINED:
    raise UserError(
      f'model.init with model.name among {", ".join(PRETRAINED)}',
      repr(model.name),
      'set --config.model.name, or remove --config.model.init',
    )
  for field, needed in (('norm', 'batch'), ('width', 1), ('depth', 1)):
    if model[field] != needed:
      raise UserError(
        f'model.{field}={needed} with model.init, as the weights have it',
        str(model[field]),
        f'remove --config.model.{field}, or --config.model.init',
      )
  if model.attention == 'none_wide':
    raise UserError(
      'model.attention other than none_wide with model.init',
      'none_wide, which has other widths than the weights',
      'set --config.model.attention=none',
    )
  if channels != len(PRETRAINED[model.name].mean):
    raise UserError(
      f'images of {len(PRETRAINED[model.name].mean)} channels with model.init',
      str(channels),
      'set --config.data.channels=3',
    )


def scaling(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(divisor, offset) by channel: a pixel p of 0..255 enters the net as p / divisor - offset."""
  row = PRETRAINED[name]
  pairs = list(zip(row.mean, row.deviation, strict=True))
  return tuple(WHITE * d for _, d in pairs), tuple(m / d for m, d in pairs)


def load(name: str, path: str, variables: PyTree) -> PyTree:
  """The variables of a model with those of a file in their place; FRESH ones stay as they are.

  Args:
    name: of the model, a row of PRETRAINED.
    path: a .safetensors file, or a folder with model.safetensors.
    variables: {'params', 'batch_stats'} as they were initialised.

  Raises:
    UserError: no such file, another format, or a tensor that is missing or has another shape.
  """
  tensors = _read(path)
  torch_names, others = PRETRAINED[name].torch_names, PRETRAINED[name].lacks
  if other := next((one for one in others if one in tensors), None):
    raise UserError(
      f'weights of {name} in {path}', f'{other}, of another net', 'use a file of this net'
    )

  def choose(place: tuple[jax.tree_util.DictKey, ...], old: jax.Array) -> jax.Array:
    ours = '/'.join(str(key.key) for key in place)
    if re.search(FRESH, ours.partition('/')[2]):
      return old
    names = torch_names(ours)
    found = next((one for one in names if one in tensors), None)
    if found is None:
      raise UserError(
        f'weights of {name} in {path}, with a tensor {" or ".join(names) or ours}',
        f'none of {len(tensors)}, such as {next(iter(tensors), "none")}',
        'use a file of this net with the names of torchvision or timm',
      )
    return jax.numpy.asarray(_in_our_layout(tensors[found], old.shape, found, path), old.dtype)

  return jax.tree.map_with_path(choose, variables)


def recognise(path: str) -> str:
  """The model whose weights a file holds, by the names of its tensors; no number is read.

  Raises:
    UserError: no such file, another format, or weights of no net without branches of PRETRAINED.
  """
  names = _read(path, names_only=True)
  plain = {model: row for model, row in PRETRAINED.items() if not model.endswith('_branches')}
  for model, row in plain.items():
    if any(one in names for one in row.has) and not any(one in names for one in row.lacks):
      return model
  raise UserError(
    f'weights of one of {", ".join(plain)} in {path}, with the names of torchvision or timm',
    f'others, such as {next(iter(names), "none")}',
    'use another file',
  )


def _in_our_layout(tensor: np.ndarray, shape: tuple[int, ...], name: str, path: str) -> np.ndarray:
  """A tensor of PyTorch as ours: kernels [out, in, h, w] become [h, w, in, out]."""
  found = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
  if found.shape != shape:
    raise UserError(
      f'{name} of shape {list(shape)} in {path}',
      f'{list(found.shape)}',
      'use the weights of this net at width 1 and depth 1, and RGB images',
    )
  if not np.isfinite(found).all():
    raise UserError(f'finite numbers in {name} of {path}', 'others', 'use another file')
  return found


def find(path: str) -> Path:
  """The file that model.init names; UserError if there is none."""
  file = expanded(path)
  if file.is_dir():
    file = file / IN_FOLDER
  if not file.is_file():
    raise UserError(
      f'a file of weights at {file}', 'none', 'correct model.init, or put the file there'
    )
  return file


def record(path: str) -> dict[str, str]:
  """What result.json says of the file that a run began with."""
  return {'file': path, 'sha256': hashlib.sha256(find(path).read_bytes()).hexdigest()}


def _read(path: str, names_only: bool = False) -> dict[str, Any]:
  """{name: tensor} of a file; None for each tensor with `names_only`."""
  from safetensors import SafetensorError, safe_open
  from safetensors.numpy import load_file

  file = find(path)
  try:
    if names_only:
      with safe_open(file, framework='numpy') as opened:
        return dict.fromkeys(opened.keys())
    return load_file(file)
  except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f'a safetensors file at {file}',
      f'another one ({" ".join(str(error).split())[:100]})',
      'convert a file of PyTorch with csba-convert-weights',
    ) from error
