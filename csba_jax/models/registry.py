"""The one visible table of models."""

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from csba_jax.errors import UserError
from csba_jax.models import multibranch

# name: (build function, its attentions); a model declares `head`, the regular expression of its
# classifier's parameters
MODELS = {'multibranch': (multibranch.build, multibranch.ATTENTIONS)}


def build(
  model: ml_collections.ConfigDict, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
  """The model of config.model: apply(variables, images [N, *image_shape], train) -> logits [N, C].

  Raises:
    UserError: unknown name, or an attention that this model does not have.
  """
  if model.name not in MODELS:
    raise UserError(
      f'model.name among {", ".join(MODELS)}', repr(model.name), 'set --config.model.name'
    )
  make, attentions = MODELS[model.name]
  if model.attention not in attentions:
    raise UserError(
      f'model.attention of {model.name} among {", ".join(attentions)}',
      repr(model.attention),
      'set --config.model.attention',
    )
  return make(num_classes, image_shape, model.attention, model.width, jnp.dtype(model.dtype))
