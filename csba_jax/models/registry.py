"""The models, in one visible table."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from csba_jax.errors import UserError
from csba_jax.models import (
  classifiers,
  efficientnet_lite,
  multibranch,
  pretrained,
  resnet,
  resnet_imagenet,
  vit,
)
from csba_jax.models.attention import ATTENTIONS, BRANCHES, MAPS, with_gate
from csba_jax.models.layers import NORMS


class Model(NamedTuple):
  """A row of MODELS. A model declares `head`, the pattern of its classifier's parameter names."""

  # (num_classes, image_shape, attention, width, dtype, classifier=, depth=, norm=) -> module; the
  # last one only for a model with `norms`
  build: Callable[..., nn.Module]
  has: tuple[str, ...] = ()  # what an attention may need of it
  norms: tuple[str, ...] = ()  # values of model.norm; none for a model that has a norm of its own


MODELS = {
  'multibranch': Model(multibranch.build, (BRANCHES, MAPS), NORMS),
  'resnet32': Model(resnet.build, (), NORMS),
  'resnet32_branches': Model(resnet.build_branches, (BRANCHES, MAPS), NORMS),
  'resnet18': Model(resnet_imagenet.build18, (), NORMS),
  'resnet50': Model(resnet_imagenet.build50, (), NORMS),
  'resnet18_branches': Model(resnet_imagenet.build18_branches, (BRANCHES, MAPS), NORMS),
  'resnet50_branches': Model(resnet_imagenet.build50_branches, (BRANCHES, MAPS), NORMS),
  'efficientnet_lite0': Model(efficientnet_lite.build, (), NORMS),
  'efficientnet_lite0_branches': Model(efficientnet_lite.build_branches, (BRANCHES, MAPS), NORMS),
  'vit': Model(vit.build, (BRANCHES,)),  # tokens have one axis of space; it has LayerNorm
}


def attentions_of(name: str) -> tuple[str, ...]:
  """The rows of ATTENTIONS that a model can have: it has what they need."""
  has = MODELS[name].has
  return tuple(key for key, attention in ATTENTIONS.items() if set(attention.needs) <= set(has))


def check(model: ml_collections.ConfigDict) -> None:
  """Raises UserError for an unknown name, or an attention or a norm that the model cannot have."""
  if model.name not in MODELS:
    raise UserError(
      f'model.name among {", ".join(MODELS)}', repr(model.name), 'set --config.model.name'
    )
  attentions = attentions_of(model.name)
  if model.attention not in attentions:
    raise UserError(
      f'model.attention of {model.name} among {", ".join(attentions)}',
      repr(model.attention),
      _other_than(model.attention, MODELS[model.name].has),
    )
  if model.head not in classifiers.KINDS:
    raise UserError(
      f'model.head among {", ".join(classifiers.KINDS)}',
      repr(model.head),
      'set --config.model.head',
    )
  row = MODELS[model.name]
  if model.norm not in (row.norms or ('batch',)):
    raise UserError(
      f'model.norm of {model.name} among {", ".join(row.norms)}'
      if row.norms
      else f'model.norm at its default, since {model.name} has LayerNorm',
      repr(model.norm),
      'set --config.model.norm' if row.norms else 'remove --config.model.norm',
    )


def build(
  model: ml_collections.ConfigDict, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
  """The model of config.model: apply(variables, images [N, *image_shape], train) -> logits [N, C].

  Raises:
    UserError: see `check`.
  """
  check(model)
  if model.init:
    pretrained.check(model, image_shape[-1])
  row = MODELS[model.name]
  dtype = jnp.dtype(model.dtype)
  classifier = classifiers.Classifier(model.head, model.scale)
  return row.build(
    num_classes,
    image_shape,
    with_gate(model.attention, model.gate),
    model.width,
    dtype,
    classifier=classifier,
    depth=model.depth,
    **({'norm': model.norm} if row.norms else {}),
  )


def _other_than(attention: str, has: tuple[str, ...]) -> str:
  """What to do about an attention that a model cannot have."""
  if attention not in ATTENTIONS:
    return 'set --config.model.attention'
  names = [name for name in MODELS if attention in attentions_of(name)]
  missing = [need for need in ATTENTIONS[attention].needs if need not in has]
  among = f'one of {", ".join(names)}' if len(names) > 1 else names[0]
  return (
    f'set --config.model.name to {among}, since {attention} needs {" and ".join(missing)},'
    ' or set --config.model.attention=none'
  )
