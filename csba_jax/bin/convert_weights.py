"""csba-convert-weights FILE.pth --out=FILE.safetensors

Writes the tensors of a PyTorch file in the safetensors format, for --config.model.init. Names and
numbers stay; bfloat16 becomes float32. PyTorch is not needed, and nothing in the file is executed.
Example: csba-convert-weights resnet18.pth --out=resnet18.safetensors
"""

from absl import flags

from csba_jax.bin import _main

_OUT = flags.DEFINE_string('out', None, 'New file, .safetensors.')


def main(weights: str) -> int:
  """Reads, writes, and says how much there was."""
  asked = _main.required(_OUT, 'weights.safetensors')

  from csba_jax.errors import UserError
  from csba_jax.files import check_new, expanded, write_atomically
  from csba_jax.models.torch_files import read_tensors

  out = expanded(asked)
  check_new('--out', out, ('.safetensors',))
  tensors = read_tensors(expanded(weights))
  if '__metadata__' in tensors:  # save() would write a file that nothing can read
    raise UserError('names of tensors', '__metadata__', 'give that tensor another name')

  from safetensors import SafetensorError
  from safetensors.numpy import save

  try:
    content = save(tensors, metadata={'format': 'pt'})  # as timm and transformers mark theirs
    write_atomically(out, lambda file: file.write(content))
  except (OSError, SafetensorError) as error:
    raise UserError(f'to write {out}', str(error), 'make room, or name another --out') from error
  numbers = sum(tensor.size for tensor in tensors.values())
  print(f'written: {out} ({len(tensors):,} tensors, {numbers:,} numbers)')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main, operand='FILE.pth')


if __name__ == '__main__':
  cli()
