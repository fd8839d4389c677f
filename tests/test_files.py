"""Paths as users write them."""

import pwd
from pathlib import Path

import pytest

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.runtime import jax_setup


def test_a_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert expanded('~/runs') == Path('/home/me/runs')
  assert expanded('runs/~') == Path('runs/~')


def test_a_user_who_is_not_there():
  with pytest.raises(
    UserError, match=r'home folder for ~nosuchuser in the path ~nosuchuser/a; found no such user; '
  ):
    expanded('~nosuchuser/a')


def test_neither_home_nor_an_entry_of_passwd(monkeypatch):
  def none(_):
    raise KeyError('no entry')

  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', none)
  for path in ('~', '~/runs'):
    with pytest.raises(UserError, match='found neither .HOME nor an entry of passwd; '):
      expanded(path)
  assert expanded('/runs') == Path('/runs')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.delenv('CSBA_CACHE_DIR', raising=False)
  with pytest.raises(UserError, match='that of the cache: CSBA_CACHE_DIR'):
    jax_setup.prepare()
