"""A predictor as a StableHLO program: uint8 images in, calibrated probabilities out."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from csba_jax.measure.predict import Predictor

PLATFORMS = ('cpu', 'cuda', 'tpu')


def program_of(predictor: Predictor) -> bytes:
  """The serialized program of a predictor, with its variables in it; see `jax.export`.

  The program takes uint8 [n, H, W, channels] with any n, and returns float32 [n, C]:
  softmax(logits / temperature + bias). One program serves CPU, CUDA and TPU. JAX keeps programs
  readable for at least six months of later versions; export again for much later ones.
  """
  from jax import export

  net, calibration = predictor.net, predictor.calibration
  shift, bias = jnp.asarray(net.shift), jnp.asarray(calibration.bias, jnp.float32)
  scale = np.float32(1 / calibration.temperature)
  variables = jax.device_get(net.variables)  # constants of the program, on no device

  def probabilities(images: Array) -> Array:
    logits = net.model.apply(variables, net.metadata.preprocessing(images), train=False)
    return jax.nn.softmax((logits.astype(jnp.float32) + shift[None]) * scale + bias[None], axis=-1)

  (n,) = export.symbolic_shape('n')
  shape = jax.ShapeDtypeStruct((n, *net.metadata.image_shape), np.uint8)
  exported = export.export(jax.jit(probabilities), platforms=PLATFORMS)(shape)
  return bytes(exported.serialize())
