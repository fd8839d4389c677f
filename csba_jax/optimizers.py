"""SGD with Nesterov momentum, warm-up and cosine decay; no weight decay on norms and biases."""

import jax
import ml_collections
import optax

PyTree = object


def schedule(learning_rate: float, warmup_fraction: float, total_steps: int) -> optax.Schedule:
  """Linear from 0 to the peak over the warm-up, then half a cosine to 0 at `total_steps`."""
  warmup = round(warmup_fraction * total_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, learning_rate, warmup),
      optax.cosine_decay_schedule(learning_rate, max(1, total_steps - warmup)),
    ],
    [warmup],
  )


def decay_mask(params: PyTree) -> PyTree:
  """True where weight decay applies: everything but parameters called `bias` or `scale`."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key not in ('bias', 'scale'), params)


def sgd(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """v <- momentum v + g + decay w;  w <- w - lr (g + decay w + momentum v), as torch.optim.SGD."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.sgd(learning_rate, momentum=momentum, nesterov=True),
  )


def build(
  train: ml_collections.ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser that config.train describes, and its learning rate by step."""
  learning_rate = schedule(train.learning_rate, train.warmup_fraction, total_steps)
  return sgd(learning_rate, train.momentum, train.weight_decay), learning_rate
