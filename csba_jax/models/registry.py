"""The one visible table of models."""

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from csba_jax.errors import UserError
from csba_jax.models import classifiers, multibranch, resnet, vit

# name: (build function, its attentions); a model declares `head`, the regular expression of its
# classifier's parameters
MODELS = {
  'multibranch': (multibranch.build, multibranch.ATTENTIONS),
  'resnet32': (resnet.build, resnet.ATTENTIONS),
  'resnet32_branches': (resnet.build_branches, resnet.BRANCH_ATTENTIONS),
  'vit': (vit.build, vit.ATTENTIONS),
}


def build(
  model: ml_collections.ConfigDict, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
  """The model of config.model: apply(variables, images [N, *image_shape], train) -> logits [N, C].

  Raises:
    UserError: unknown name or head, or an attention that this model does not have.
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
      _other_than(model.attention),
    )
  if model.head not in classifiers.KINDS:
    raise UserError(
      f'model.head among {", ".join(classifiers.KINDS)}',
      repr(model.head),
      'set --config.model.head',
    )
  dtype = jnp.dtype(model.dtype)
  classifier = classifiers.Classifier(model.head, model.scale)
  return make(
    num_classes,
    image_shape,
    model.attention,
    model.width,
    dtype,
    classifier=classifier,
    depth=model.depth,
  )


def _other_than(attention: str) -> str:
  """What to do about an attention that a model does not have."""
  names = [name for name, (_, attentions) in MODELS.items() if attention in attentions]
  if not names:
    return 'set --config.model.attention'
  why = 'CSBA needs branches: ' if attention.startswith('csba') else ''
  among = f'one of {", ".join(names)}' if len(names) > 1 else names[0]
  return f'{why}set --config.model.name to {among}, or --config.model.attention=none'
