"""Blocks of layers, and names that fit."""

import pytest

from csba_jax.gradients.blocks import LARGEST_BLOCK, blocks, shorten, within, wrap


def test_every_layer_is_in_one_block_in_its_order():
  names = ['head', 'stem/conv', 'stem/norm']
  for stage in (1, 2):
    names += [f'stage{stage}/block{j}/{part}' for j in range(5) for part in ('a', 'b', 'c', 'd')]
  found = blocks(names)
  assert [i for _, members in found for i in members] == list(range(len(names)))
  assert [name for name, _ in found][:4] == ['', 'stem', 'stage1/block0', 'stage1/block1']
  assert max(len(members) for _, members in found) <= LARGEST_BLOCK


def test_a_small_block_is_not_split_and_flat_names_cannot_be():
  assert blocks(['a/b/c', 'a/d/e']) == [('a', [0, 1])]
  flat = [f'a/Conv_{i}' for i in range(50)]
  assert blocks(flat) == [('a', list(range(50)))]
  assert blocks([]) == []


@pytest.mark.parametrize(
  ('name', 'block', 'rest'), [('a/b', 'a', 'b'), ('a', '', 'a'), ('a/b/c', 'a/b', 'c')]
)
def test_a_name_within_its_block(name, block, rest):
  assert within(name, block) == rest


def test_names_that_are_too_long():
  assert shorten('abc', 3) == 'abc'
  assert [len(shorten('x' * 50, n)) for n in (5, 6, 28)] == [5, 6, 28]
  name = 'stage1/' + 'y' * 30 + '/conv'
  assert all(len(line) <= 12 for line in wrap(name, 12))
  assert ''.join(wrap('stage1/block0/conv1', 10)) == 'stage1/block0/conv1'
