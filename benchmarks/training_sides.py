"""The same training step in JAX and in PyTorch, of the multi-branch net and of ResNet-32.

A step converts uint8 images to float, runs forward and backward, updates batch statistics, and
takes a step of SGD with Nesterov momentum and weight decay, without augmentation.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from csba_jax import config as config_lib
from csba_jax.methods import losses, optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.runtime import sharding
from csba_jax.training import step as step_lib

CHANNELS, SIZE, CLASSES = 3, 32, 10
SHAPE = (SIZE, SIZE, CHANNELS)
NETS = ('multibranch', 'resnet32')


@dataclasses.dataclass(frozen=True)
class Setting:
  """What both sides train.

  Attributes:
    net: a name of NETS.
    attention: 'none' or 'csba'; ResNet-32 has none.
    width: of the multi-branch net.
    dtype: 'float32', or 'bfloat16' with parameters in float32 (PyTorch: autocast).
    batch: images a step.
  """

  net: str = 'multibranch'
  attention: str = 'csba'
  width: float = 1.0
  dtype: str = 'float32'
  batch: int = 128

  def recipe(self) -> ml_collections.ConfigDict:
    """The default config with this net."""
    config = config_lib.default()
    config.model.name, config.model.dtype = self.net, self.dtype
    config.model.attention = self.attention if self.net == 'multibranch' else 'none'
    config.model.width = self.width if self.net == 'multibranch' else 1.0
    config.train.batch_size = self.batch
    return config

  def build(self) -> nn.Module:
    """The Flax net."""
    return registry.build(self.recipe().model, CLASSES, SHAPE)

  def images_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images [batch, 32, 32, 3] and int32 labels [batch]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (self.batch, *SHAPE), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, self.batch, dtype=np.int32)


def jax_steps(setting: Setting, at_once: int = 1) -> Callable[[int], float]:
  """run(n): n dispatches of `at_once` steps each, then waits; returns the last loss."""
  config, model = setting.recipe(), setting.build()
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, SHAPE, 0)
  layout = sharding.layout(config)
  step_fn = step_lib.make_step(config, model, tx, np.ones(CLASSES), 10_000, layout)
  images, labels = setting.images_and_labels()
  data = jax.device_put({'image': images, 'label': labels})
  positions = np.tile(np.arange(setting.batch, dtype=np.int32), (at_once, 1))
  indices, key = {'own': positions}, jax.random.key(0)

  def run(n: int) -> float:
    nonlocal state
    for _ in range(n):
      state, metrics = step_lib.compiled_steps()(
        state, data, indices, key, step_fn=step_fn, layout=layout
      )
    return float(jax.block_until_ready((state, metrics))[1]['loss'][-1])

  return run


def torch_steps(
  setting: Setting, device: str, threads: int, compiled: bool = False
) -> Callable[[int], float]:
  """run(n): n steps in PyTorch with channels last; returns the last loss.

  Products and convolutions of float32 may use TF32, as JAX's do on GPUs.

  Args:
    device: 'cpu' or 'cuda'.
    threads: of the CPU.
    compiled: whether torch.compile translates the net; the optimiser stays as it is.
  """
  import torch

  from benchmarks import torch_multibranch

  torch.set_num_threads(threads)
  torch.backends.cudnn.benchmark = True
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  net = _twin(setting).to(device, memory_format=torch.channels_last)
  sgd = torch_multibranch.optimizer(net, setting.recipe().train)
  forward = torch.compile(net) if compiled else net
  images, labels = setting.images_and_labels()
  x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # channels last already
  y = torch.from_numpy(labels.astype(np.int64)).to(device)
  half = setting.dtype == 'bfloat16'

  def run(n: int) -> float:
    for _ in range(n):
      sgd.zero_grad()
      with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
        logits = forward(x.float() / 127.5 - 1)
      loss = torch.nn.functional.cross_entropy(logits.float(), y)
      loss.backward()
      sgd.step()
    return loss.item()

  return run


def check_twins(setting: Setting) -> int:
  """Asserts that both nets give the same in float64; returns the number of parameters.

  Parameters are drawn, because at the start gates are 1 and their first layer has no gradient.
  """
  import torch

  from benchmarks import torch_multibranch

  setting = dataclasses.replace(setting, batch=16)
  images, labels = setting.images_and_labels()
  with jax.enable_x64(True):
    model = dataclasses.replace(setting, dtype='float64').build()
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    rng = np.random.default_rng(0)
    variables['params'] = jax.tree.map(
      lambda x: x + 0.05 * rng.normal(size=x.shape), variables['params']
    )
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)

    def objective(params):
      inputs = jnp.asarray(images) / 127.5 - 1
      mutable = {'params': params, 'batch_stats': variables['batch_stats']}
      logits, _ = model.apply(mutable, inputs, train=True, mutable=['batch_stats'])
      return losses.cross_entropy(logits, labels).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(variables['params'])
    expected = torch_multibranch.from_flax(grads)
  net = _twin(setting).double()
  net.load_state_dict(torch_multibranch.from_flax(variables['params']), strict=False)
  theirs = net(torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1)
  torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels).long()).backward()
  np.testing.assert_allclose(theirs.detach().numpy(), logits, rtol=1e-6, atol=1e-6)
  assert expected.keys() == dict(net.named_parameters()).keys()
  for name, parameter in net.named_parameters():
    error = (parameter.grad - expected[name]).norm() / expected[name].norm()
    assert error < 1e-5, (name, error)  # our classifier computes in float32
  return sum(x.size for x in jax.tree.leaves(variables['params']))


def _twin(setting: Setting):
  from benchmarks import torch_multibranch, torch_resnet

  nets = {'multibranch': torch_multibranch.Net, 'resnet32': torch_resnet.Net}
  return nets[setting.net](setting.build())
