"""Grad-CAM against its formula, where the classifier is a mean over space and one layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from csba_jax.errors import UserError
from csba_jax.measure import grad_cam, predict
from csba_jax.measure.calibration import Calibration
from csba_jax.measure.predict import Predictor
from csba_jax.models import layers, multibranch, resnet, vit
from csba_jax.report import overlays
from csba_jax.run.net import Metadata, Net

SHAPE = (12, 8, 3)


class Small(nn.Module):
  """Two stages and a classifier; its class activation map has a formula."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(layers.Conv(4, (3, 3), name='stage1')(x))
    x = layers.Conv(5, (3, 3), 2, name='stage2')(x)
    return nn.Dense(3, name='head')(nn.relu(x).mean((1, 2)))


def net_of(model, shape):
  variables = {'batch_stats': {}, **model.init(jax.random.key(1), jnp.zeros((1, *shape)))}
  return Net(model, variables, Metadata(('a', 'b', 'c'), np.asarray([3, 2, 1]), shape))


@pytest.fixture(scope='module')
def net():
  return net_of(Small(), SHAPE)


def images(n, shape=SHAPE):
  return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def by_formula(net, pixels, label):
  """The maps by hand: the slope of the logit is w_k / (h w) where A_k > 0, and 0 elsewhere."""
  params = net.params
  x = jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32)
  x = nn.relu(layers.convolve(x, params['stage1']['kernel']))
  maps = np.asarray(layers.convolve(x, params['stage2']['kernel'], 2))[0]
  size = maps.shape[0] * maps.shape[1]
  slopes = (maps > 0) * np.asarray(params['head']['kernel'])[:, label] / size
  found = np.maximum((slopes.mean((0, 1)) * maps).sum(-1), 0)
  return found / (found.max() or 1)


def test_it_is_its_formula(net):
  assert grad_cam.last_maps(net) == ('stage2', (6, 4, 5))
  pixels, labels = images(7), np.asarray([0, 1, 2, 0, 1, 2, 0])
  found = grad_cam.heat_maps(net, pixels, labels)
  assert found.shape == (7, 6, 4)
  for one, image, label in zip(found, pixels, labels, strict=True):
    np.testing.assert_allclose(one, by_formula(net, image, label), atol=1e-5)


def test_an_image_without_evidence_has_an_empty_map(net):
  params = jax.tree.map(jnp.copy, net.params)
  params['head']['kernel'] = jnp.zeros_like(params['head']['kernel'])
  found = grad_cam.heat_maps(net.replace(params=params), images(2), np.asarray([0, 1]))
  assert (found == 0).all()


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('model', 'shape', 'name', 'maps'),
  [
    (multibranch.build(3, (16, 16, 1), 'csba', 0.05, jnp.float32), (16, 16, 1), 'stage3', (4, 4)),
    (resnet.build(3, (16, 16, 1), 'none', 0.1, jnp.float32), (16, 16, 1), 'stage3', (4, 4)),
    (vit.build(3, (16, 16, 1), 'csba', 0.1, jnp.float32), (16, 16, 1), 'norm', None),
  ],
  ids=['multibranch', 'resnet32', 'vit'],
)
def test_every_model_has_maps(model, shape, name, maps):
  net = net_of(model, shape)
  found = grad_cam.heat_maps(net, images(2, shape), np.asarray([0, 2]))
  assert grad_cam.last_maps(net)[0] == name
  assert found.shape[1] == found.shape[2] > 1
  if maps:
    assert found.shape[1:] == maps
  assert np.isfinite(found).all()
  assert 0 <= found.min() <= found.max() <= 1


# ---- pictures


def test_the_overlay_is_the_photo_where_the_map_is_0():
  image = images(1, (8, 8, 1))[0]
  found = np.asarray(overlays.overlay(image, np.zeros((2, 2))))
  assert found.shape == (256, 256, 3)
  np.testing.assert_array_equal(found[::32, ::32, 0], image[..., 0])
  hot = np.asarray(overlays.overlay(np.zeros((300, 400, 3), np.uint8), np.ones((2, 2))))
  yellow = np.asarray([252, 255, 164])  # the end of inferno
  assert hot.shape == (300, 400, 3)
  assert abs(hot - 0.55 * yellow).max() <= 1


def test_each_readable_photo_has_a_picture_of_its_own(net, tmp_path):
  photos = tmp_path / 'photos'
  (photos / 'more').mkdir(parents=True)
  pixels = images(4, (8, 8, 3))
  names = ('a.jpg', 'a.png', 'more/é.png')
  for name, one in zip(names, pixels, strict=False):
    PIL.Image.fromarray(one).save(photos / name)
  (photos / 'b.png').write_bytes(b'')
  square = net_of(Small(), (8, 8, 3))
  predictor = Predictor(square, None, Calibration(1.0, np.zeros(3)), np.ones(3))
  files = [photos / name for name in (*names[:2], 'b.png', names[2])]
  draw = overlays.Overlays(tmp_path / 'seen', photos)
  found = list(predictor.predict(files, explain=draw))
  assert [bool(one.reason) for one in found] == [False, False, True, False]
  made = sorted(path.relative_to(tmp_path / 'seen') for path in (tmp_path / 'seen').rglob('*.png'))
  assert [str(path) for path in made] == ['a.jpg.png', 'a.png.png', 'more/é.png.png']
  (heat,) = grad_cam.heat_maps(square, pixels[1:2], np.asarray([found[1].probabilities.argmax()]))
  picture = np.asarray(PIL.Image.open(tmp_path / 'seen/a.png.png'))
  np.testing.assert_array_equal(picture, np.asarray(overlays.overlay(pixels[1], heat)))


def test_one_photo_alone(tmp_path):
  draw = overlays.Overlays(tmp_path / 'seen', tmp_path / 'a.png')
  draw(tmp_path / 'a.png', images(1, (8, 8, 3))[0], np.ones((2, 2)))
  assert (tmp_path / 'seen/a.png.png').exists()


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'seen').write_text('')
  with pytest.raises(UserError, match='expected to write .*a.png.png; found .*; to fix it: make'):
    overlays.Overlays(tmp_path / 'seen', tmp_path)(
      tmp_path / 'a.png', images(1, (8, 8, 3))[0], np.ones((2, 2))
    )


def test_batches_are_of_one_size():
  sizes = []

  def work(rows, doubled):
    sizes.append(len(rows))
    return rows + doubled

  rows = np.arange(2 * predict.BATCH + 3)
  found = np.concatenate(list(predict.in_batches(work, rows, 2 * rows)))
  np.testing.assert_array_equal(found, 3 * rows)
  assert sizes == [predict.BATCH] * 3
