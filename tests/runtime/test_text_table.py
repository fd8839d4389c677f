"""Columns of plain text."""

import numpy as np
import pytest
from rich.cells import cell_len

from csba_jax.runtime import text_table


def test_align_left_then_right():
  rows = [['name', 'n'], ['a', '1000'], [], ['longer name', '7', 'x']]
  assert text_table.align(rows) == 'name            n\na            1000\n\nlonger name     7  x'


def test_align_leaves_no_space_at_the_end():
  assert text_table.align([['a', '', ''], ['bb', 'c', '']]) == 'a\nbb  c'


def test_letters_that_take_two_columns_are_aligned():
  # the last one has an accent of its own, which takes none
  rows = [['name', 'n'], ['日本', '7'], ['ab', '10'], ['cafe\u0301', '3']]
  assert text_table.align(rows).splitlines() == [
    'name   n',
    '日本   7',
    'ab    10',
    'cafe\u0301   3',
  ]


def test_names_are_whole_where_they_fit():
  names = ['Clean', 'Electrical-damage', '日本']
  assert text_table.fit(names, 17) == names
  assert text_table.fit(names, 8) == ['Clean', 'Electr..', '日本']


def test_names_that_are_cut_stay_distinct():
  assert text_table.fit(['damage left', 'damage right'], 8) == ['dama..ft', 'dama..ht']
  middle = [f'kind number {i} of all the panels there are' for i in range(12)]
  assert len(set(text_table.fit(middle, 8))) == 12
  assert all('..' in name for name in text_table.fit(middle, 8))
  apart = [f'{"a" * 30}{i}{"b" * 30}{i // 3 % 3}{"c" * 30}' for i in range(9)]
  twisted = [f'{"x" * 20}{a}{"y" * 20}{b}{"z" * 20}' for a in 'pq' for b in 'rs']
  for names in (apart, twisted):
    found = text_table.fit(names, 8)
    assert len(set(found)) == len(names)
    assert max(map(len, found)) <= 8
  assert text_table.fit(twisted, 8) == ['xxxxxx~1', 'xxxxxx~2', 'xxxxxx~3', 'xxxxxx~4']


@pytest.mark.parametrize('seed', range(20))
def test_any_names_are_cut_to_the_width_and_stay_distinct(seed):
  rng = np.random.default_rng(seed)
  letters = list('ab日é')
  names = list({''.join(rng.choice(letters, rng.integers(1, 30))) for _ in range(50)})
  for width in (5, 8, 20):
    found = text_table.fit(names, width)
    assert len(set(found)) == len(names)
    assert all(cell_len(name) <= width for name in found)
    assert all(
      cut == name for cut, name in zip(found, names, strict=True) if len(name) * 2 <= width
    )


def test_a_matrix_has_whole_names_where_the_terminal_is_wide(monkeypatch):
  names, cells = ['Electrical-damage', 'Snow'], [['1', '2'], ['3', '4']]
  monkeypatch.setenv('COLUMNS', '100')
  assert text_table.matrix('matrix', names, [7, 8], cells).splitlines() == [
    'matrix                 Electrical-damage  Snow',
    'Electrical-damage (7)                  1     2',
    'Snow (8)                               3     4',
  ]
  monkeypatch.setenv('COLUMNS', '45')
  assert text_table.matrix('matrix', names, [7, 8], cells).splitlines()[0].split() == [
    'matrix',
    'Electric..',
    'Snow',
  ]
