"""Strict defaults for every test: CPU, 8 host devices, rank promotion raises."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def data_root():
  """Folder of prepared TFDS sets, or a skip that says how to get one."""
  root = os.environ.get('TFDS_DATA_DIR')
  if not root or not os.path.isdir(os.path.join(root, 'cifar10')):
    pytest.skip('no real CIFAR-10: set TFDS_DATA_DIR to a folder that holds cifar10/')
  return root


@pytest.fixture(scope='session')
def photo_folder():
  """Folder of CLASS/file photos with a manifest, or a skip that says how to get one."""
  root = os.environ.get('CSBA_IMAGE_FOLDER')
  if not root or not os.path.isdir(root):
    pytest.skip('no real photos: set CSBA_IMAGE_FOLDER to a folder of CLASS/file.jpg')
  return root
