"""What differs between CPU and accelerators, in one place."""

import jax


def steps_per_dispatch(longest: int) -> int:
  """How many training steps one compiled call does: `longest` on GPU and TPU, 1 on CPU.

  Convolutions inside a scan are about 40 times slower on the CPU backend.
  """
  return 1 if jax.default_backend() == 'cpu' else longest


def compiler_options() -> dict[str, str]:
  """XLA options of the training step.

  On CPU, reductions go to XLA's YNN library, which spreads the sums of batch normalisation over the
  cores; matrix products do not. benchmarks/README.md has the times.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
