"""3x3 convolutions with zeros around, and other ways to compute them and their gradients.

All take and give float32 images [N, H, W, channels] and kernels [3, 3, C, D].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from csba_jax.models import layers

# Winograd's transforms of tiles of the input, of the kernel, and back
INTO = np.asarray([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
KERNEL = np.asarray([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
BACK = np.asarray([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)
OFFSETS = [(i, j) for i in range(3) for j in range(3)]


def padded(x: Array) -> Array:
  """[N, H, W, C] -> [N, H + 2, W + 2, C] with zeros around."""
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def patches(x: Array) -> Array:
  """The nine shifted images, in memory.   [N, H, W, C] -> [N H W, 9 C]"""
  _, h, w, c = x.shape
  wide = padded(x)
  found = jnp.concatenate([wide[:, i : i + h, j : j + w] for i, j in OFFSETS], -1)
  return lax.optimization_barrier(found.reshape(-1, 9 * c))


def rows_of(x: Array) -> Array:
  """[..., D] -> [rows, D]."""
  return x.reshape(-1, x.shape[-1])


# ---- forward: (x [N, H, W, C], kernel [3, 3, C, D]) -> [N, H, W, D]


def by_patches(x: Array, kernel: Array) -> Array:
  """One product with the patches."""
  return (patches(x) @ rows_of(kernel)).reshape(*x.shape[:3], -1)


def by_slices(x: Array, kernel: Array) -> Array:
  """Convolutions of 16 images each."""
  return jnp.concatenate([layers.convolve(x[i : i + 16], kernel) for i in range(0, len(x), 16)])


def by_winograd(x: Array, kernel: Array) -> Array:
  """Winograd's F(2x2, 3x3) (Lavin & Gray 2016): 16 products for 4 pixels, where others take 36."""
  n, h, w, c = x.shape
  wide = padded(x)
  tiles = [[wide[:, a : a + h - 1 : 2, b : b + w - 1 : 2] for b in range(4)] for a in range(4)]
  over_rows = [_combined(INTO, [tiles[a][b] for a in range(4)]) for b in range(4)]
  turned = [_combined(INTO, [over_rows[b][i] for b in range(4)]) for i in range(4)]
  inputs = lax.optimization_barrier(jnp.stack([rows_of(v) for line in turned for v in line]))
  weights = jnp.einsum('ia,abcd,jb->ijcd', KERNEL, kernel, KERNEL).reshape(16, c, -1)
  products = lax.optimization_barrier(inputs @ weights).reshape(4, 4, n, h // 2, w // 2, -1)
  over_rows = [_combined(BACK, [products[i, j] for i in range(4)]) for j in range(4)]
  found = [_combined(BACK, [over_rows[j][p] for j in range(4)]) for p in range(2)]
  lines = [jnp.stack(line, 3).reshape(n, h // 2, w, -1) for line in found]
  return jnp.stack(lines, 2).reshape(n, h, w, -1)


def _combined(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
  """The sums of the parts with the weights of each row: 0, 1 or -1."""
  return [
    sum(weight * part for weight, part in zip(row, parts, strict=True) if weight)  # type: ignore
    for row in matrix
  ]


# ---- input gradient: (g [N, H, W, D], kernel) -> [N, H, W, C]


def input_gradient(g: Array, kernel: Array) -> Array:
  """JAX's."""
  like = jnp.zeros((*g.shape[:3], kernel.shape[2]))
  return jax.linear_transpose(lambda x: layers.convolve(x, kernel), like)(g)[0]


def with_turned_kernel(g: Array, kernel: Array) -> Array:
  """A plain convolution with the kernel turned by 180 degrees, which is stored first."""
  turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
  return layers.convolve(g, turned)


# ---- kernel gradient: (x, g) -> [3, 3, C, D]


def kernel_gradient(x: Array, g: Array) -> Array:
  """JAX's."""
  like = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]))
  return jax.linear_transpose(lambda kernel: layers.convolve(x, kernel), like)(g)[0]


def kernel_by_patches(x: Array, g: Array) -> Array:
  """One product of the patches and g."""
  return (patches(x).T @ rows_of(g)).reshape(3, 3, x.shape[-1], -1)


def kernel_by_nine(x: Array, g: Array) -> Array:
  """Nine products, one of each shift."""
  _, h, w, c = x.shape
  wide, flat = padded(x), rows_of(g)
  shifted = [lax.optimization_barrier(wide[:, i : i + h, j : j + w]) for i, j in OFFSETS]
  return jnp.stack([rows_of(one).T @ flat for one in shifted]).reshape(3, 3, c, -1)


def kernel_by_image(x: Array, g: Array) -> Array:
  """A product for each image, and their sum."""
  n, h, w, c = x.shape
  each = jnp.einsum('npc,npd->ncd', patches(x).reshape(n, h * w, -1), g.reshape(n, h * w, -1))
  return lax.optimization_barrier(each).sum(0).reshape(3, 3, c, -1)


def kernel_by_rows_and_columns(x: Array, g: Array) -> Array:
  """One product of three vertical shifts of x and three horizontal shifts of g."""
  c, d, h = x.shape[-1], g.shape[-1], x.shape[1]
  wide = padded(x)
  down = jnp.concatenate([wide[:, i : i + h] for i in range(3)], -1)
  across = [jnp.pad(g, ((0, 0), (0, 0), (j, 2 - j), (0, 0))) for j in range(3)]
  down, across = lax.optimization_barrier((down, jnp.concatenate(across, -1)))
  return (rows_of(down).T @ rows_of(across)).reshape(3, c, 3, d).swapaxes(1, 2)


def kernel_with_stored_transposes(x: Array, g: Array) -> Array:
  """The convolution that JAX takes, with images last, after explicit transposes."""
  turned = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))
  found = lax.conv_general_dilated(
    *turned, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return found.transpose(1, 2, 0, 3)


WAYS: dict[str, list[Callable[[Array, Array], Array]]] = {
  'forward': [layers.convolve, by_patches, by_slices, by_winograd],
  'input gradient': [input_gradient, with_turned_kernel],
  'kernel gradient': [
    kernel_gradient,
    kernel_by_patches,
    kernel_by_nine,
    kernel_by_image,
    kernel_by_rows_and_columns,
    kernel_with_stored_transposes,
  ],
}
