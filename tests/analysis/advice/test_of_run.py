"""The evidence of a run is what its net says about its validation images."""

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.analysis.advice import of_run
from csba_jax.run import restore
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop


@pytest.fixture(scope='module')
def run(driver, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('advice') / 'run'
  with StopRequest() as stop:
    loop.train_and_evaluate(driver.tiny_config(train__epochs=1), str(workdir), stop)
  return restore.load_run(str(workdir))


def test_the_validation_images_and_no_others(run):
  found = of_run.evidence_of(run, None)
  np.testing.assert_array_equal(found.validation.labels, run.data.val.labels)
  logits = np.asarray(run.net.logits(np.asarray(run.data.val.images)))
  np.testing.assert_allclose(found.validation.logits, logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found.class_counts, run.data.class_counts)
  assert found.class_names == run.data.class_names
  assert (found.conflict, found.contradictions) == (None, 0)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [('{"copies_across_classes": [["a", "b"], ["c", "d"]]}', 2), ('{', 0), ('[]', 0), ('{}', 0)],
)
def test_contradictions_come_from_the_audit(run, text, expected):
  path = run.workdir / 'audit.json'
  path.write_text(text)
  try:
    assert of_run.evidence_of(run, None).contradictions == expected
  finally:
    path.unlink()


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('loss.name', 'focal', False),
    ('loss.name', 'balanced_softmax', True),
    ('loss.name', 'ldam', True),
    ('loss.weights', 'inverse', True),
    ('loss.post_hoc_tau', 1.0, True),
    ('sampler.name', 'class', True),
    ('stage.method', 'crt', True),
  ],
)
def test_what_corrects_for_class_sizes(field, value, expected):
  config = config_lib.default()
  config.loss.name = 'cross_entropy'
  assert not of_run.corrects_class_sizes(config)
  config.update_from_flattened_dict({field: value})
  assert of_run.corrects_class_sizes(config) == expected
