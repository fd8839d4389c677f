"""Constants of accelerators, and the time that a program would take according to them."""

import dataclasses
from collections.abc import Iterable

from csba_jax.errors import UserError
from csba_jax.planning.collectives import Collective

# Assumed share of the peak FLOP/s. It is a guess, the same for every accelerator: convolutions of
# few channels reach less, and large matrix products more.
UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device, with the constants of its data sheet, without sparsity.

  Attributes:
    bfloat16: FLOP/s of products of bfloat16.
    float32: FLOP/s of float32 products at JAX's default precision: TF32 on GPUs, one pass of
      bfloat16 on TPUs.
    highest: FLOP/s of float32 products at the highest precision, which Grams need.
    memory: bytes.
    memory_rate: bytes/s.
    inside: bytes/s that a device sends to others of its node (GPU) or pod (TPU), in one direction
      over all of its links; half of the bidirectional number.
    between: bytes/s that it sends to other nodes or pods: its share of the host's network.
    node: devices of a node or pod.
  """

  bfloat16: float
  float32: float
  highest: float
  memory: float
  memory_rate: float
  inside: float
  between: float
  node: int


HARDWARE = {
  # NVIDIA H100 Tensor Core GPU datasheet, SXM5: 1,979 and 989 TFLOP/s with sparsity, so half of it;
  # FP32 67 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 900 GB/s. NVIDIA DGX H100 datasheet: 8 GPUs, a
  # ConnectX-7 of 400 Gb/s for each.
  'h100': Accelerator(989.5e12, 494.5e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8),
  # NVIDIA H200 Tensor Core GPU datasheet, SXM: as H100, with 141 GB and 4.8 TB/s.
  'h200': Accelerator(989.5e12, 494.5e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8),
  # NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM: 312, 156 and 19.5 TFLOP/s, 2,039 GB/s, NVLink
  # 600 GB/s. NVIDIA DGX A100 datasheet: 8 GPUs, an adapter of 200 Gb/s for each.
  'a100': Accelerator(312e12, 156e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, 8),
  # docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1,200 GB/s, pods of 4,096; all-reduce
  # bandwidth of a pod 1.1 PB/s, by chip 268 GB/s. Its network is not stated there: that of v5p, and
  # no mesh of up to 4,096 devices leaves a pod. Highest precision on TPUs: six passes of bfloat16
  # (jax.lax.Precision).
  'v4': Accelerator(275e12, 275e12, 275e12 / 6, 32 * 2**30, 1.2e12, 268e9, 6.25e9, 4096),
  # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s bidirectional, pods
  # of 256 with a network of 6.4 Tb/s.
  'v5e': Accelerator(197e12, 197e12, 197e12 / 6, 16e9, 819e9, 200e9, 3.125e9, 256),
  # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2,765 GB/s, 1,200 GB/s bidirectional,
  # 50 Gb/s of network for each chip, pods of 8,960.
  'v5p': Accelerator(459e12, 459e12, 459e12 / 6, 95 * 2**30, 2.765e12, 600e9, 6.25e9, 8960),
  # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,638 GB/s, 800 GB/s bidirectional, pods
  # of 256 with a network of 25.6 Tb/s.
  'v6e': Accelerator(918e12, 918e12, 918e12 / 6, 32e9, 1.638e12, 400e9, 12.5e9, 256),
}


def find(name: str) -> Accelerator:
  """The accelerator of config.parallel.hardware; UserError for an unknown name."""
  if name not in HARDWARE:
    raise UserError(
      f'parallel.hardware among {", ".join(HARDWARE)}', repr(name), 'set --config.parallel.hardware'
    )
  return HARDWARE[name]


@dataclasses.dataclass(frozen=True)
class Seconds:
  """The seconds of one call of a program; only compute and memory traffic overlap."""

  compute: float
  memory: float
  communication: float

  @property
  def total(self) -> float:
    """max(compute, memory) + communication."""
    return max(self.compute, self.memory) + self.communication

  @property
  def share(self) -> float:
    """The share of communication in the total."""
    return self.communication / self.total if self.total else 0.0


def seconds(
  accelerator: Accelerator,
  flops: float,
  bytes_accessed: float,
  collectives: Iterable[Collective],
  dtype: str = 'float32',
  highest_flops: float = 0.0,
) -> Seconds:
  """A roofline model, plus each collective as a ring over the slowest link that it uses.

  Args:
    accelerator: its constants.
    flops: FLOPs of a device in products of `dtype`.
    bytes_accessed: bytes of a device's memory that are read and written.
    collectives: the collectives of the program; latency is not counted.
    dtype: dtype of the computation, float32 or bfloat16.
    highest_flops: FLOPs of a device in float32 products of the highest precision.
  """
  peak = accelerator.bfloat16 if dtype == 'bfloat16' else accelerator.float32
  communication = 0.0
  for c in collectives:
    rate = accelerator.between if c.spans(accelerator.node) else accelerator.inside
    communication += c.sent / rate
  return Seconds(
    compute=(flops / peak + highest_flops / accelerator.highest) / UTILISATION,
    memory=bytes_accessed / accelerator.memory_rate,
    communication=communication,
  )
