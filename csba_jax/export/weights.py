"""The variables of a net in the safetensors format, which many programs read."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from csba_jax.run.net import Net


def weights_of(net: Net) -> bytes:
  """The content of a .safetensors file: params.LAYER.kernel, batch_stats.LAYER.mean, ...

  Kernels of convolutions are [height, width, in, out] and those of dense layers [in, out].
  """
  from safetensors.numpy import save

  flat = flatten_dict(jax.device_get(net.variables), sep='.')
  arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
  return save(arrays, metadata={'format': 'flax'})
