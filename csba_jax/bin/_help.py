"""The text of --help: the docstring of a binary, then its own flags in groups."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from absl import flags

ASKS_ALL = {'--helpfull', '-helpfull', '--helpxml', '-helpxml'}  # flags of libraries too
ASKS = {'--help', '-help', '-h', '--helpshort', '-helpshort', '-?', *ASKS_ALL}
WIDTH, COLUMN = 100, 34  # characters of a line, and before a flag's description
# Groups by the module that defines their flags. A binary's own module has the first group.
GROUPS = {
  'csba_jax.bin._sample': 'What is measured',
  'csba_jax.bin._photos': 'A folder of photos (docs/photos.md)',
  'csba_jax.bin._decisions': 'Which class is predicted',
  'csba_jax.bin._distributed': 'Several processes (docs/launching.md)',
}
# What --config.FIELD is, by binary.
CONFIG = {
  'train': 'Any field of csba_jax/config.py, such as --config.train.epochs=20.',
  'study': (
    'A field of the study, such as --config.seeds=5, or of all its runs, such as '
    '--config.base.train.epochs=20.'
  ),
}
UNSET = {'process': -1, 'processes': 0}  # defaults that say that the flag was not given
# What the value of a flag is; of the others it is a number.
VALUES = {
  'workdir': 'DIR',
  'data': 'DIR',
  'out': 'FILE',
  'min_recall': 'CLASS:R',
  'min_confidence': 'P',
  'field_prior': 'uniform|FILE',
  'workdirs': 'DIR,DIR,...',
  'data_dir': 'DIR',
  'results': 'DIR',
  'readme': 'FILE',
  'checkpoint': 'best|latest|init|STEP',
  'layers': 'REGEX',
  'coordinator': 'HOST:PORT',
  'shard': 'I/N',
}


def is_asked_for(arguments: Sequence[str], words: Collection[str] = ASKS) -> bool:
  """Whether a command line asks for help."""
  return any(word in words for word in arguments)


def text(main: Callable[[], int | None], values: flags.FlagValues) -> str:
  """Help on a binary.

  Args:
    main: its function; the docstring of its module holds usage and example.
    values: all flags, of which those of imported libraries are left out.
  """
  module = inspect.getmodule(main)
  if module is None:
    raise TypeError(f'{main} is defined in no module')
  parts = [(module.__doc__ or '').strip()]
  own = [sys.argv[0], module.__name__]  # absl names the main module by its file
  parts.append(
    _group('Flags', _flags_of(own, values), CONFIG.get(Path(inspect.getfile(main)).stem))
  )
  for name, title in GROUPS.items():
    if found := _flags_of([name], values):
      parts.append(_group(title, found))
  return '\n\n'.join(parts)


def own_flags(values: flags.FlagValues) -> list[flags.Flag]:
  """The flags of the binary, without those of imported libraries."""
  modules = values.flags_by_module_dict()
  own = [sys.argv[0], *(name for name in modules if name.startswith('csba_jax.bin.'))]
  config = [values['config']] if 'config' in values else []
  return [*config, *_flags_of(own, values)]


def _flags_of(modules: Iterable[str], values: flags.FlagValues) -> list[flags.Flag]:
  """Flags that these modules define, in the order of their definition."""
  by_module = values.flags_by_module_dict()
  found = [flag for name in modules for flag in by_module.get(name, [])]
  return [flag for flag in found if flag.name != 'config']


def _group(title: str, found: Iterable[flags.Flag], fields: str | None = None) -> str:
  lines = [f'{title}:']
  if fields is not None:
    lines += _lines('--config=NAME', flags.FLAGS['config'].help)
    lines += _lines('--config.FIELD=VALUE', fields)
  for flag in found:
    lines += _lines(_usage(flag), _description(flag))
  return '\n'.join(lines)


def _usage(flag: flags.Flag) -> str:
  if flag.boolean:
    return f'--{flag.name}'
  if isinstance(flag.parser, flags.EnumParser):
    return f'--{flag.name}={"|".join(flag.parser.enum_values)}'
  return f'--{flag.name}={VALUES.get(flag.name, "N")}'


def _description(flag: flags.Flag) -> str:
  words = flag.help.rpartition('>: ')[2]  # absl puts the values of an enum before the text
  words = words.partition(';\n')[0]  # and behind it that a flag may be repeated
  if flag.boolean or flag.default in (None, '', [], UNSET.get(flag.name)):
    return words
  return f'{words} Default: {flag.default}.'


def _lines(usage: str, description: str) -> list[str]:
  """Usage in the left column, the wrapped description in the right one."""
  wrapped = textwrap.wrap(description, WIDTH - COLUMN)
  head = f'  {usage}'
  if len(head) >= COLUMN:
    return [head, *(' ' * COLUMN + line for line in wrapped)]
  return [head.ljust(COLUMN) + wrapped[0], *(' ' * COLUMN + line for line in wrapped[1:])]
