"""Whether the networks that benchmarks compare are the same here and in PyTorch."""

import pytest

from benchmarks import training_sides


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('net', 'attention'), [('multibranch', 'csba'), ('multibranch', 'none'), ('resnet32', 'none')]
)
def test_a_network_and_its_copy_in_pytorch_have_the_same_logits_and_gradients(net, attention):
  pytest.importorskip('torch', reason='needs PyTorch: pip install -e .[bench]')
  setting = training_sides.Setting(net, attention)
  assert training_sides.check_twins(setting) > 400_000
