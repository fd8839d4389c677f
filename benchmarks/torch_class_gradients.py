"""Class gradients and their Gram matrices in PyTorch: the peers of this project's own.

  python -m benchmarks.torch_class_gradients    # checks that they agree

For images x [C, n, ch, H, W], labels y [C, n] and cross-entropy, g_c is the gradient of
mean_i loss(x[c, i], y[c, i]) with respect to every parameter, and for the layer l (the module that
owns the parameters) G_l[c, d] = <g_c, g_d>. The net is in eval mode: the norms' statistics are
constants, their scale and bias are parameters that count. A peer takes net and x in the memory
layout that it is given: channels last for both is the caller's choice.
"""

import copy
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from flax import linen
from torch import Tensor, nn

from benchmarks import torch_multibranch, torch_resnet
from csba_jax.models import multibranch, resnet

# It is about the stem, whose images need no gradient.
warnings.filterwarnings('ignore', 'Full backward hook is firing')

TOLERANCE = 1e-4  # of |G_cd - reference| / sqrt(G_cc G_dd)


class Unsupported(Exception):
  """A peer does not support this net, or is not installed; the message says why."""


def layer_of(name: str) -> str:
  """'stage1.block1.conv1.weight' -> 'stage1.block1.conv1'."""
  return name.rpartition('.')[0]


def gram(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
  """G_l[c, d] = sum over l's parameters of <g_c, g_d>.   {name: [C, ...]} -> {layer: [C, C]}"""
  grams = {}
  for name, gradient in gradients.items():
    flat = gradient.flatten(1)
    layer = layer_of(name)
    grams[layer] = grams.get(layer, 0) + flat @ flat.T
  return grams


def stacked(net: nn.Module, by_class: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
  """A tuple of gradients for each class -> {name: [C, ...]}."""
  names = [name for name, _ in net.named_parameters()]
  return {name: torch.stack(g) for name, g in zip(names, zip(*by_class, strict=True), strict=True)}


def class_losses(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
  """mean_i loss(x[c, i], y[c, i]) from one forward of the flat batch.   -> [C]"""
  losses = F.cross_entropy(net(x.flatten(0, 1)), y.flatten(), reduction='none')
  return losses.view(y.shape).mean(1)


def ordinary(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """The gradient of the mean loss of the flat batch, without a Gram: the unit of the ratios."""
  loss = F.cross_entropy(net(x.flatten(0, 1)), y.flatten())
  names, parameters = zip(*net.named_parameters(), strict=True)
  return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def retain_graph(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """One forward of the flat batch, C backward passes through all of it."""
  losses, parameters = class_losses(net, x, y), list(net.parameters())
  last = len(losses) - 1
  by_class = [
    torch.autograd.grad(loss, parameters, retain_graph=c < last) for c, loss in enumerate(losses)
  ]
  return gram(stacked(net, by_class))


def slice_gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """A forward and backward of each class's slice.   -> {name: [C, ...]}"""
  parameters = list(net.parameters())
  losses = (F.cross_entropy(net(a), b) for a, b in zip(x, y, strict=True))
  return stacked(net, [torch.autograd.grad(loss, parameters) for loss in losses])


def class_slices(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """A forward and backward of each class's slice, in a loop: the reference."""
  return gram(slice_gradients(net, x, y))


def vmap(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """torch.func: the gradient of one class's loss, mapped over classes."""
  parameters = {name: p.detach() for name, p in net.named_parameters()}
  buffers = dict(net.named_buffers())

  def loss(parameters, a, b):
    return F.cross_entropy(torch.func.functional_call(net, (parameters, buffers), (a,)), b)

  return gram(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y))


def hookable(net: nn.Module) -> torch.fx.GraphModule:
  """A copy whose ReLUs are not in place, parameters and statistics shared with the net.

  A module hook hands on a view of the module's output, which may not be written to.
  """
  shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
  try:
    copied = torch.fx.symbolic_trace(copy.deepcopy(net, shared))
  except torch.fx.proxy.TraceError as error:
    raise Unsupported(f'torch.fx cannot trace the net: {error}') from error
  for node in copied.graph.nodes:
    if node.target is F.relu:
      node.kwargs = {}
  copied.recompile()
  return copied


def owners(net: nn.Module) -> dict[str, nn.Module]:
  """The modules that own parameters, by name."""
  return {name: m for name, m in net.named_modules() if list(m.parameters(recurse=False))}


def reject_unknown_layers(net: nn.Module, peer: str) -> None:
  """Raises Unsupported unless every parameter belongs to a layer that the peer has a rule for."""
  unknown = {type(m).__name__ for m in owners(net).values()} - {'Conv2d', 'Linear', 'BatchNorm2d'}
  if unknown:
    raise Unsupported(f'no per-example rule of {peer} tried for {sorted(unknown)}')


# A peer prepares a net once, as its user would. Later calls reuse it at no cost.


@functools.cache
def torchjd_engine(net: nn.Module):
  """Copy of the net and TorchJD's engine on it."""
  try:
    from torchjd.autogram import Engine
  except ImportError as error:
    raise Unsupported('pip install torchjd==0.18.0') from error
  copied = hookable(net)
  # With a batch dimension the engine refuses BatchNorm in any mode, and would give the Gram of
  # single images.
  return copied, Engine(copied, batch_dim=None)


def torchjd(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """TorchJD's autogram engine on the C losses: C backward passes by vmap, layer by layer."""
  copied, engine = torchjd_engine(net)
  return {'total': engine.compute_gramian(class_losses(copied, x, y))}


@functools.cache
def backpack_net(net: nn.Module) -> nn.Module:
  """Copy of the net whose layers BackPACK watches."""
  try:
    from backpack import extend
  except ImportError as error:
    message = 'pip install --no-deps backpack-for-pytorch==1.7.1 unfoldNd==0.2.3'
    raise Unsupported(message) from error
  reject_unknown_layers(net, 'BackPACK')
  copied = hookable(net)
  for module in owners(copied).values():
    extend(module)
  return copied


def backpack(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """BackPACK's BatchGrad: gradients of single images, summed by class layer by layer."""
  copied = backpack_net(net)
  from backpack import backpack as watching
  from backpack import extensions

  grams, names = {}, {module: name for name, module in owners(copied).items()}

  def reduce(module):
    sums = {}
    for kind, parameter in module.named_parameters():
      sums[f'{names[module]}.{kind}'] = parameter.grad_batch.unflatten(0, y.shape).sum(1)
      del parameter.grad_batch
    grams.update(gram(sums))

  with watching(extensions.BatchGrad(), extension_hook=reduce):
    class_losses(copied, x, y).sum().backward()
  net.zero_grad()
  return grams


class FrozenNorm(nn.Module):
  """BatchNorm by running statistics in either mode, which are no buffers.  [N, C, H, W] -> same"""

  def __init__(self, norm: nn.BatchNorm2d):
    super().__init__()
    self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
    self.statistics = norm.running_mean, norm.running_var

  def forward(self, x):
    return F.batch_norm(x, *self.statistics, self.weight, self.bias, eps=self.eps)


def frozen_norm_rule(layer: FrozenNorm, activations, backprops) -> dict[nn.Parameter, Tensor]:
  """Gradients of single images with respect to scale and bias, [N, C] each."""
  mean, var = (s[:, None, None] for s in layer.statistics)
  normed = (activations[0] - mean) * (var + layer.eps).rsqrt()
  return {
    layer.weight: torch.einsum('nchw,nchw->nc', normed, backprops),
    layer.bias: backprops.sum((2, 3)),
  }


@functools.cache
def opacus_net(net: nn.Module) -> nn.Module:
  """Copy of the net whose layers Opacus watches."""
  try:
    from opacus import grad_sample
  except ImportError as error:
    raise Unsupported('pip install --no-deps opacus==1.6.0') from error
  reject_unknown_layers(net, 'Opacus')
  # Opacus refuses a layer with buffers, and watches none that is in eval mode.
  grad_sample.register_grad_sampler(FrozenNorm)(frozen_norm_rule)
  copied = hookable(net)
  for name, module in owners(copied).items():
    if isinstance(module, nn.BatchNorm2d):
      copied.set_submodule(name, FrozenNorm(module))
    if isinstance(module, nn.Conv2d):
      # For channels-last activations its patches are wrong, without any error.
      module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
  return grad_sample.GradSampleModule(copied.train(), loss_reduction='sum')


def opacus(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
  """Opacus's GradSampleModule: gradients of single images, summed by class; norms replaced."""
  copied = opacus_net(net)
  class_losses(copied, x, y).sum().backward()
  sums = {}
  for name, parameter in net.named_parameters():
    sums[name] = parameter.grad_sample.unflatten(0, y.shape).sum(1)
    parameter.grad_sample = None
  net.zero_grad()
  return gram(sums)


PEERS: dict[str, tuple[Callable[..., dict[str, Tensor]], str]] = {
  'ordinary': (ordinary, 'one gradient of the mean loss, no Gram: the baseline'),
  'retain_graph': (retain_graph, 'one forward of the batch, C backwards through all of it'),
  'class_slices': (class_slices, 'forward and backward of each class in a loop; the reference'),
  'vmap': (vmap, 'torch.func: vmap over classes of grad of the mean loss of one'),
  'torchjd': (torchjd, 'TorchJD autogram, batch_dim=None: the C backwards under vmap; total only'),
  'backpack': (backpack, 'BackPACK BatchGrad of every image, summed by class layer by layer'),
  'opacus': (opacus, 'Opacus grad_sample of every image, summed by class at the end'),
}


def variables_of(model) -> dict:
  """Random parameters, statistics of a few batches of noise: random ones would break the net."""
  images = jax.random.normal(jax.random.key(1), (20, 8, 32, 32, 3))
  # low optimisation, for a program that runs once: the same bits, and much less time to compile
  init = jax.jit(model.init, compiler_options={'xla_backend_optimization_level': 1})
  variables = init(jax.random.key(0), images[0])
  step = jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))
  for batch in images:
    variables = variables | step(variables, batch)[1]
  return variables


def build_nets(num_classes: int) -> dict[str, tuple[dict, linen.Module, nn.Module]]:
  """{name: (variables, Flax model, PyTorch twin in eval mode)}: narrow multi-branch, ResNet-32."""
  branches = multibranch.build(num_classes, (32, 32, 3), 'csba', 0.125, jnp.float32)
  residual = resnet.ResNet(num_classes)
  found = {}
  for name, model, twin in (
    ('multibranch', branches, torch_multibranch.Net(branches)),
    ('resnet32', residual, torch_resnet.Net(residual)),
  ):
    variables = variables_of(model)
    twin.load_state_dict(torch_resnet.state_from_flax(variables), strict=False)
    found[name] = variables, model, twin.eval().to(memory_format=torch.channels_last)
  return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
  """max over layers, c and d of |G_cd - expected G_cd| / sqrt(expected G_cc expected G_dd)."""
  assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
  errors = []
  for layer, reference in expected.items():
    norms = reference.diagonal().sqrt()
    assert norms.min() > 0, f'{layer}: a gradient is zero, which any peer would get right'
    errors.append(((found[layer] - reference).abs() / torch.outer(norms, norms)).max().item())
  return float(np.max(errors))  # keeps a NaN


def agreement(name: str, net: nn.Module, x: Tensor, y: Tensor) -> str:
  """Says whether a peer agrees with `class_slices`."""
  try:
    found = PEERS[name][0](net, x, y)
  except Unsupported as reason:
    return f'unsupported: {reason}'
  reference = slice_gradients(net, x, y)
  if name == 'ordinary':  # the mean of the class gradients; a Gram of one row on either side
    found = gram({key: g[None] for key, g in found.items()})
    expected = gram({key: g.mean(0, keepdim=True) for key, g in reference.items()})
  else:
    expected = gram(reference)
    if found.keys() == {'total'}:
      expected = {'total': sum(expected.values())}
  error = relative_error(found, expected)
  return f'{"agrees" if error < TOLERANCE else "DIFFERS"} ({error:.1e}, {len(found)} layers)'


def check(num_classes: int, images: int) -> bool:
  """Prints a line for each net and peer; returns whether all peers agree with `class_slices`."""
  rng, lines = np.random.default_rng(1), []
  x = rng.standard_normal((num_classes, images, 32, 32, 3), dtype=np.float32)
  labels = np.arange(num_classes).repeat(images).reshape(num_classes, images)
  for net_name, (variables, model, net) in build_nets(num_classes).items():
    inputs, y = torch.from_numpy(x).permute(0, 1, 4, 2, 3), torch.from_numpy(labels)
    logits = jax.jit(model.apply)(variables, x.reshape(-1, *x.shape[2:]))
    with torch.no_grad():
      np.testing.assert_allclose(net(inputs.flatten(0, 1)), logits, rtol=1e-4, atol=1e-4)
    for name in PEERS:
      lines.append(f'{net_name:12} {name:13} {agreement(name, net, inputs, y)}')
      print(lines[-1], flush=True)
  return not any('DIFFERS' in line for line in lines)


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # where PyTorch computes here
  raise SystemExit(not check(num_classes=3, images=2))
