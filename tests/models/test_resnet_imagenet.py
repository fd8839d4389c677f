"""ResNet-18 and -50 against PyTorch, with the same weights, under the names of torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from csba_jax.models import capacity, pretrained, resnet_imagenet

SMALL = (33, 40, 3)  # odd, and not square


def build(name, attention='none', classes=7, shape=SMALL):
  make = getattr(resnet_imagenet, f'build{name.removeprefix("resnet")}')
  return make(classes, shape, attention, 1.0, jnp.float32)


@pytest.mark.parametrize(
  ('name', 'parameters'), [('resnet18', 11_689_512), ('resnet50', 25_557_032)]
)
def test_number_of_parameters(name, parameters):
  assert capacity.parameter_count(build(name, classes=1000), (224, 224, 3)) == parameters


def torch_net(torch, blocks, bottleneck, classes=7):
  """The net by hand, in torch's own layers and with torchvision's names."""
  nn = torch.nn

  class Block(nn.Module):
    def __init__(self, before, width, stride):
      super().__init__()
      after = 4 * width if bottleneck else width
      sizes = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
      if not bottleneck:
        sizes = [(before, width, 3, stride), (width, width, 3, 1)]
      for i, (a, b, size, step) in enumerate(sizes, 1):
        setattr(self, f'conv{i}', nn.Conv2d(a, b, size, step, size // 2, bias=False))
        setattr(self, f'bn{i}', nn.BatchNorm2d(b))
      self.number = len(sizes)
      self.downsample = None
      if stride != 1 or before != after:
        conv = nn.Conv2d(before, after, 1, stride, bias=False)
        self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
      u = x
      for i in range(1, self.number + 1):
        u = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(u))
        u = u if i == self.number else u.relu()
      return (u + (x if self.downsample is None else self.downsample(x))).relu()

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
      self.bn1 = nn.BatchNorm2d(64)
      before = 64
      for i, (number, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        made = []
        for j in range(number):
          made.append(Block(before, width, 2 if i > 1 and j == 0 else 1))
          before = 4 * width if bottleneck else width
        setattr(self, f'layer{i}', nn.Sequential(*made))
      self.fc = nn.Linear(before, classes)

    def forward(self, x):
      x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
      for i in range(1, 5):
        x = getattr(self, f'layer{i}')(x)
      return self.fc(x.mean((2, 3)))

  torch.manual_seed(0)
  net = Net().eval()
  for buffer in net.buffers():
    if buffer.ndim:
      buffer.uniform_(0.5, 1.5)
  return net


def saved(net, path):
  arrays = {k: np.ascontiguousarray(v.numpy()) for k, v in net.state_dict().items()}
  save_file(arrays, path)
  return arrays


@pytest.mark.seconds
@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_it_is_torchs_net_with_torchs_weights(name, tmp_path):
  torch = pytest.importorskip('torch')
  blocks = resnet_imagenet.RESNET50 if name == 'resnet50' else resnet_imagenet.RESNET18
  other = torch_net(torch, blocks, name == 'resnet50')
  weights = saved(other, tmp_path / 'model.safetensors')
  model = build(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SMALL)))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  variables = pretrained.load(name, str(tmp_path), zeros)
  head = {'kernel': weights['fc.weight'].T[None], 'bias': weights['fc.bias']}
  variables['params']['head'] = jax.tree.map(jnp.asarray, head)
  x = np.random.default_rng(0).normal(size=(2, *SMALL)).astype(np.float32)
  with torch.no_grad():
    expected = other(torch.asarray(x.transpose(0, 3, 1, 2))).numpy()
  found = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x))
  assert abs(found - expected).max() <= 1e-4 * abs(expected).max()
  used = {pretrained.PRETRAINED[name].torch_names(key)[0] for key in named(variables)}
  unused = {k for k in weights if not k.endswith('num_batches_tracked')} - used
  assert unused == {'fc.weight', 'fc.bias'}  # every other tensor has its place


def named(variables):
  names = flatten_dict(variables, sep='/')
  return [name for name in names if not name.startswith('params/head/')]


@pytest.mark.parametrize('attention', ['none', 'csba', 'se', 'cbam', 'csba_class'])
def test_branches_all_take_the_last_stage(attention):
  model = build('resnet18_branches', attention)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SMALL)))
  plain = jax.eval_shape(build('resnet18').init, jax.random.key(0), jnp.zeros((1, *SMALL)))
  names = flatten_dict(shapes, sep='/')
  of_torch = {key: resnet_imagenet.torch_names(key) for key in names}
  fresh = [key for key, found in of_torch.items() if not found]
  assert all('/attention/' in key or '/head/' in key or '/class_gate/' in key for key in fresh)
  assert any('/attention/' in key for key in fresh) == (attention != 'none')
  expected = {resnet_imagenet.torch_names(key) for key in named(plain)}
  assert {found for found in of_torch.values() if found} == expected
  of_one = [key for key, found in of_torch.items() if found == ('layer4.1.bn2.weight',)]
  assert of_one == [f'params/stage4/branch{b}/block2/norm2/scale' for b in (1, 2, 3)]


@pytest.mark.seconds
def test_none_wide_has_the_parameters_of_csba():
  wide, csba = (
    capacity.parameter_count(build('resnet18_branches', kind, 10), SMALL)
    for kind in ('none_wide', 'csba')
  )
  assert wide == pytest.approx(csba, rel=0.01)


@pytest.mark.parametrize('shape', [(1, 7, 8, 2), (2, 6, 5, 3), (1, 1, 1, 1)])
def test_the_pooling_is_the_maximum_of_its_window(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = np.asarray(resnet_imagenet.max_pool3(jnp.asarray(x)))
  h, w = shape[1:3]
  assert found.shape == (shape[0], -(-h // 2), -(-w // 2), shape[3])
  for i, j in np.ndindex(found.shape[1:3]):
    window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
    np.testing.assert_array_equal(found[:, i, j], window.max((1, 2)))
