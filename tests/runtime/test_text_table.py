"""Columns of plain text."""

from csba_jax.runtime import text_table


def test_align_left_then_right():
  rows = [['name', 'n'], ['a', '1000'], [], ['longer name', '7', 'x']]
  assert text_table.align(rows) == 'name            n\na            1000\n\nlonger name     7  x'


def test_align_leaves_no_space_at_the_end():
  assert text_table.align([['a', '', ''], ['bb', 'c', '']]) == 'a\nbb  c'
