"""The lines of a study's results: appended whole, repaired after a kill, read with what is damaged.

A record is a JSON object of one line with `FIELDS`; its axes have the variant and `UNIT`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.run import checks
from csba_jax.run.workdir import strict_json, writing_to

SCHEMA = 1
FIELDS = ('study', 'run', 'status', 'axes', 'config_sha256', 'versions')  # of every record
UNIT = ('split', 'repeat', 'fold', 'seed')  # axes that every record has, beside the variant

Record = Mapping[str, Any]

_repaired: set[Path] = set()  # files that this process has appended to


def append(path: str | os.PathLike, record: Record) -> str | None:
  """Adds one line, on disk on return, with a single write; NaN becomes null.

  The first call of a process for a file repairs it: returns `repair`'s note, else None.
  """
  path = Path(path).absolute()
  line = (strict_json(record) + '\n').encode()
  note = None
  if path not in _repaired:
    note = repair(path)
    _repaired.add(path)
  with writing_to(path.parent):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      length = os.fstat(handle).st_size
      written = os.write(handle, line)
      if written < len(line):  # a full disk: no half line stays
        os.ftruncate(handle, length)
        raise OSError(f'no room for {len(line)} bytes in {path.name}')
      os.fsync(handle)
    finally:
      os.close(handle)
  return note


def repair(path: str | os.PathLike) -> str | None:
  """Repairs what a process that was killed while writing, or a `cat` of such files, has left.

  Every whole record gets a line of its own. A line with anything else goes to PATH.torn; but one
  without any record that is not the last stays, and `load` refuses it.

  Returns:
    What was done, or None for a file that needs nothing or is not there.
  """
  path = Path(path)
  if not path.exists():
    return None
  with writing_to(path.parent):
    content = path.read_bytes()
    lines = _lines(content)
    repaired = b''.join(line.repaired for line in lines)
    if repaired == content:
      return None
    torn = path.with_name(f'{path.name}.torn')
    if lost := b''.join(line.content.rstrip(b'\n') + b'\n' for line in lines if line.lost):
      with open(torn, 'ab') as file:  # on disk before a line goes from the results
        file.write(lost)
        file.flush()
        os.fsync(file.fileno())
    write_atomically(path, lambda file: file.write(repaired))
  said = [line.told(torn.name) for line in lines]
  return f'{path.name}: {"; ".join(words for words in said if words)}'


def load(path: str | os.PathLike) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
  """The records of one file, in the order of its lines, and a note about each damaged line.

  Reads only. A file that is not there has no records. Of a damaged line the whole records in it
  count: that is what `cat` leaves behind a last line that was torn, or had no line end.

  Raises:
    UserError: a damaged line without a whole record that is not the last, or a record of another
      kind.
  """
  path = Path(path)
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return [], ()
  except OSError as error:
    raise UserError(
      f'a readable {path}', error.strerror or str(error), 'change its permissions'
    ) from error
  records, notes = [], []
  for line in _lines(content):
    if line.hopeless:
      raise UserError(
        f'a JSON object on each line of {path}',
        f'a damaged line {line.number}',
        f'remove it (sed -i {line.number}d FILE) and start the study again: it does that run again',
      )
    records += [_checked(record, f'line {line.number} of {path}') for record in line.records]
    notes += [f'{path.name}: {line.damage}'] if line.damage else []
  return records, tuple(notes)


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line with what is whole in it."""

  number: int  # from 1
  content: bytes  # with its line end, if it has one
  last: bool
  records: tuple[dict[str, Any], ...]
  texts: tuple[bytes, ...]  # of the records
  rest: bytes = b''  # what else a damaged line has

  @property
  def hopeless(self) -> bool:
    """Whether there is nothing to keep in it, and no process that was killed explains it."""
    return bool(self.rest) and not self.records and not self.last

  @property
  def lost(self) -> bool:
    """Whether repairing it leaves something out."""
    return bool(self.rest) and not self.hopeless

  @property
  def repaired(self) -> bytes:
    """The lines that take its place."""
    if self.lost or len(self.texts) > 1:
      return b''.join(text + b'\n' for text in self.texts)
    return self.content if self.content.endswith(b'\n') else self.content + b'\n'

  @property
  def damage(self) -> str:
    """What a reader of the records should know of it; '' of a whole one."""
    if self.rest and not self.records:
      return f'the last line is torn ({len(self.rest)} bytes) and left out'
    if self.rest:
      runs = ', '.join(f'run {record["run"]}' for record in self.records)
      kept = f'{runs} {"is" if len(self.records) == 1 else "are"} kept'
      name = re.search(rb'"run": "([^"]*)"', self.rest)
      of = f' of run {name.group(1).decode(errors="replace")}' if name else ''
      return f'line {self.number} was damaged: {kept}, {len(self.rest)} bytes{of} are lost'
    if len(self.records) > 1:
      held = f'line {self.number} held {len(self.records)} runs without a line end between them'
      return f'{held}; nothing is lost'
    return ''

  def told(self, torn: str) -> str:
    """The same once it is repaired and, where something was lost, kept whole in the file `torn`."""
    if self.rest and not self.records:
      words = f'the last line was torn ({len(self.rest)} bytes, kept in {torn}); repaired'
      return f'{words}, its run counts as not finished'
    if self.rest:
      return f'{self.damage} (the whole line is in {torn}); repaired'
    if not self.content.endswith(b'\n') and not self.damage:
      return 'the last line had no line end; repaired, nothing is lost'
    return self.damage and f'{self.damage}; repaired'


def _lines(content: bytes) -> list[_Line]:
  found = []
  lines = content.splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    at = (number, line, number == len(lines))
    if (record := _parse(line)) is not None:
      found.append(_Line(*at, (record,), (line,)))
    elif not line.strip():
      found.append(_Line(*at, (), ()))
    else:
      texts, rest = _whole(line.rstrip(b'\n'))
      found.append(_Line(*at, tuple(json.loads(text) for text in texts), texts, rest))
  return found


def _whole(line: bytes) -> tuple[tuple[bytes, ...], bytes]:
  """(the whole records in a damaged line, the rest of it).

  An object inside a torn record may be whole, too, but has not the fields of a record.
  """
  text = line.decode('latin-1')  # a character for each byte; brackets and quotes are what they are
  decoder, texts, rest, at = json.JSONDecoder(), [], b'', 0
  while (start := text.find('{', at)) >= 0:
    try:
      found, end = decoder.raw_decode(text, start)
    except ValueError:
      found, end = {}, start + 1
    if set(FIELDS) <= found.keys():
      texts.append(line[start:end])
      rest += line[at:start]
    else:
      rest += line[at:end]
    at = end
  rest += line[at:]
  return tuple(texts), rest if rest.strip() else b''


def _parse(line: bytes) -> dict[str, Any] | None:
  """The JSON object of a line; None for anything else."""
  try:
    record = json.loads(line)
  except ValueError:  # also of bytes that are not UTF-8
    return None
  return record if isinstance(record, dict) else None


def _checked(record: dict[str, Any], where: str) -> dict[str, Any]:
  """The record, if it is one of this schema."""
  axes = record.get('axes')
  lacking = [field for field in FIELDS if field not in record]
  lacking += [
    f'axes.{a}' for a in ('variant', *UNIT) if not isinstance(axes, dict) or a not in axes
  ]
  if record.get('status') == 'done' and not record.get('result'):
    lacking.append('result')
  found = f'without {", ".join(lacking)}' if lacking else f'status {record["status"]!r}'
  if record.get('schema') != SCHEMA:
    found = f'schema {record.get("schema")}'
  elif not lacking and record['status'] in ('done', 'failed'):
    try:
      checks.check_record(record)
      return record
    except ValueError as error:
      found = str(error)
  raise UserError(
    f'a record of csba-study, schema {SCHEMA}, on {where}', found, 'remove the line, or the file'
  )
