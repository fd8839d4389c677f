"""The picture of an evaluation: where it is, and that it is no reason to fail."""

import os

import pytest

from csba_jax.measure import evaluate

RESULT = {
  'class_names': ['a', 'b'],
  'class_counts': [5, 7],
  'confusion_matrix': [[3, 1], [0, 2]],
  'checkpoint_step': 40,
}


@pytest.mark.parametrize(
  ('tau', 'name'), [(0.0, 'confusion_val_step000040'), (1.5, 'confusion_val_step000040_tau1.5')]
)
def test_the_name_tells_what_was_evaluated(tmp_path, tau, name):
  line = evaluate.draw_confusion(RESULT | {'post_hoc_tau': tau}, str(tmp_path), 'val')
  assert line == f'written: {tmp_path}/{name}.png'
  assert [path.name for path in tmp_path.iterdir()] == [f'{name}.png']


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  def read_only(*_, **__):
    raise OSError(30, 'Read-only file system')

  monkeypatch.setattr(os, 'replace', read_only)
  line = evaluate.draw_confusion(RESULT | {'post_hoc_tau': 0.0}, str(tmp_path), 'test')
  assert line == 'the confusion matrix was not drawn: [Errno 30] Read-only file system'
  assert list(tmp_path.iterdir()) == []
