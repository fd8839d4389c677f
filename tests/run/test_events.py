"""Event files are whole and read back, by the format's own checksums."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from csba_jax.run.events import EventFile


def read(path):
  """Events of a file: records of length, its checksum, data, its checksum (TFRecord)."""
  data, events = path.read_bytes(), []
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    assert struct.unpack('<I', data[8:12])[0] == masked_crc32c(data[:8])
    body = data[12 : 12 + length]
    assert struct.unpack('<I', data[12 + length : 16 + length])[0] == masked_crc32c(body)
    events.append(Event.FromString(body))
    data = data[16 + length :]
  return events


def test_points_are_on_disk_at_once_and_later_steps_are_purged(tmp_path):
  folder = tmp_path / 'tensorboard'
  events = EventFile(folder, step=7)
  events.scalars(9, {'train_loss': 0.5, 'learning_rate': 0.1})
  (path,) = folder.iterdir()  # still open
  version, start, points = read(path)
  assert version.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (7, SessionLog.START)
  assert points.step == 9
  values = {value.tag: value.simple_value for value in points.summary.value}
  assert values == pytest.approx({'train_loss': 0.5, 'learning_rate': 0.1})
  events.close()
  again = EventFile(folder, step=9)
  again.close()
  assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='Not a directory'):
    EventFile(tmp_path / 'file' / 'tensorboard', step=0)
