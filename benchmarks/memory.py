"""Memory of the class Grams of a large net with many classes: a bound, and as compiled.

  python -m benchmarks.memory [--classes=1000] [--images=4] [--gibibytes=4]

The net is ResNet-50 at 224x224 (25.6 M parameters with 1,000 classes). Nothing runs. XLA's analysis
of the compiled step says how much it would allocate. Compare it with max(limit, C x largest layer)
plus the memory of the gradient of one class.
"""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from csba_jax.gradients import class_grams
from csba_jax.gradients.gram import Layers
from csba_jax.models import layers

_CLASSES = flags.DEFINE_integer('classes', 1000, 'Number of classes, C.', 2)
_IMAGES = flags.DEFINE_integer('images', 4, 'Images of each class.', 1)
_LIMIT = flags.DEFINE_float('gibibytes', 4, 'max_bytes of class_grams.', 0)

BLOCKS, CHANNELS = (3, 4, 6, 3), (64, 128, 256, 512)


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 with four times the channels, and a shortcut (He et al. 2016)."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(layers.BatchNorm, use_running_average=True)
    y = layers.ConvNormRelu(self.features, (1, 1), name='reduce')(x, False)
    y = layers.ConvNormRelu(self.features, (3, 3), self.stride, name='space')(y, False)
    y = norm(name='norm')(layers.Conv(4 * self.features, (1, 1), name='expand')(y))
    if x.shape != y.shape:
      x = layers.Conv(4 * self.features, (1, 1), self.stride, name='shortcut')(x)
      x = norm(name='shortcut_norm')(x)
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """[N, 224, 224, 3] -> logits [N, num_classes], with frozen statistics."""

  num_classes: int

  @nn.compact
  def __call__(self, x):
    x = layers.ConvNormRelu(CHANNELS[0], (7, 7), 2, name='stem')(x, False)
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, (blocks, features) in enumerate(zip(BLOCKS, CHANNELS, strict=True), 1):
      for block in range(1, blocks + 1):
        stride = 2 if block == 1 < stage else 1
        x = Bottleneck(features, stride, name=f'stage{stage}_block{block}')(x)
    return nn.Dense(self.num_classes, name='head')(x.mean((1, 2)))


def main(_) -> None:
  """Prints the bound and what the compiled step allocates."""
  classes, images, limit = _CLASSES.value, _IMAGES.value, int(_LIMIT.value * 2**30)
  model = ResNet50(classes)
  example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), example)

  def grams(params, stats, batch, max_bytes):
    def losses_fn(params, batch):
      logits = model.apply({'params': params, 'batch_stats': stats}, batch['image'])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

    call = functools.partial(class_grams, losses_fn, params, batch, num_classes=len(batch['label']))
    return call(per_example=True, head='^head/', max_bytes=max_bytes)

  def compiled(params, stats, classes, max_bytes):
    batch = {
      'image': jax.ShapeDtypeStruct((classes, images, 224, 224, 3), jnp.float32),
      'label': jax.ShapeDtypeStruct((classes, images), jnp.int32),
    }
    start = time.perf_counter()
    step = jax.jit(grams, static_argnames='max_bytes')
    found = step.lower(params, stats, batch, max_bytes=max_bytes).compile().memory_analysis()
    return found, time.perf_counter() - start

  params, stats = variables['params'], variables['batch_stats']
  found = Layers.of(params, None, '^head/')
  leaves = jax.tree.leaves(params)
  sizes = found.class_gradient_bytes(leaves, classes)
  passes = found.passes(leaves, classes, limit)
  alone, _ = compiled(params, stats, 1, limit)
  memory, seconds = compiled(params, stats, classes, limit)
  gib = 2**30
  print(f'{sum(x.size for x in leaves) / 1e6:.1f} M parameters, C = {classes}, n = {images}')
  print(f'all class gradients at once: {sum(sizes) / gib:.1f} GiB')
  print(f'{len(passes)} passes of at most {max(limit, *sizes) / gib:.2f} GiB (largest layer)')
  print(f'Grams of {len(sizes)} layers: {len(sizes) * classes**2 * 4 / gib:.2f} GiB')
  print(f'one class alone, compiled: {alone.temp_size_in_bytes / gib:.2f} GiB of temporaries')
  print(
    f'compiled: temporaries {memory.temp_size_in_bytes / gib:.2f} GiB, results '
    f'{memory.output_size_in_bytes / gib:.2f} GiB, arguments (images, parameters) '
    f'{memory.argument_size_in_bytes / gib:.2f} GiB; compiled in {seconds:.0f} s'
  )


if __name__ == '__main__':
  app.run(main)
