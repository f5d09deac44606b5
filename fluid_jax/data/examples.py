"""Serialises and parses `tf.train.Example` without TensorFlow.

Importing TensorFlow would cost each worker of `prepare.ingest` 4 s and 700 MB. The message is
defined as in https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example, in a
separate protobuf pool, so that it does not conflict with TensorFlow's definition.
"""

import functools
from collections.abc import Collection
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

MAX_VALUES = 1000  # decoded values per feature
_LARGE = 1 << 22  # bytes
_LISTS = {  # field of Feature -> its number, and the type of its values
  'bytes_list': (1, 'TYPE_BYTES'),
  'float_list': (2, 'TYPE_FLOAT'),
  'int64_list': (3, 'TYPE_INT64'),
}


@functools.cache
def _message(wanted: str) -> type[message.Message]:
  proto = descriptor_pb2.FileDescriptorProto(
    name='example.proto', package='tensorflow', syntax='proto3'
  )
  kind, label = descriptor_pb2.FieldDescriptorProto.Type, descriptor_pb2.FieldDescriptorProto.Label

  def add(parent: Any, name: str, number: int, type_name: str, is_repeated: bool = False) -> Any:
    is_message = not type_name.startswith('TYPE_')
    return parent.field.add(
      name=name,
      number=number,
      label=label.Value('LABEL_REPEATED' if is_repeated else 'LABEL_OPTIONAL'),
      type=kind.Value('TYPE_MESSAGE' if is_message else type_name),
      type_name=f'.tensorflow.{type_name}' if is_message else None,
    )

  feature = proto.message_type.add(name='Feature')
  feature.oneof_decl.add(name='kind')
  for name, (number, type_name) in _LISTS.items():
    list_name = name.title().replace('_', '')
    add(proto.message_type.add(name=list_name), 'value', 1, type_name, is_repeated=True)
    add(feature, name, number, list_name).oneof_index = 0
  # RawExample has the same wire format with features as bytes, so that only some can be parsed.
  for kind_of, value in (('', 'Feature'), ('Raw', 'TYPE_BYTES')):
    features = proto.message_type.add(name=f'{kind_of}Features')
    entry = features.nested_type.add(name='FeatureEntry')
    entry.options.map_entry = True
    add(entry, 'key', 1, 'TYPE_STRING')
    add(entry, 'value', 2, value)
    add(features, 'feature', 1, f'{kind_of}Features.FeatureEntry', is_repeated=True)
    example = proto.message_type.add(name=f'{kind_of}Example')
    add(example, 'features', 1, f'{kind_of}Features')
  pool = descriptor_pool.DescriptorPool()
  pool.Add(proto)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'tensorflow.{wanted}'))


def encode(features: dict[str, Any]) -> bytes:
  """Serialises an example. The same features give the same bytes.

  Args:
    features: feature name -> bytes, text, integer or float, or a list of one of these types.
  """
  example = _message('Example')()
  for name, value in features.items():
    values = value if isinstance(value, list) else [value]
    values = [v.encode() if isinstance(v, str) else v for v in values]
    feature = example.features.feature[name]
    if not values or isinstance(values[0], bytes):
      feature.bytes_list.value.extend(values)
    elif isinstance(values[0], int):
      feature.int64_list.value.extend(values)
    else:
      feature.float_list.value.extend(values)
  return example.SerializeToString(deterministic=True)


def decode(payload: bytes, names: Collection[str] | None = None) -> dict[str, list]:
  """Parses the features of a serialised example.

  Args:
    payload: the example.
    names: names of the features to parse; all if None.

  Returns:
    Feature name -> list of bytes, integers or floats, at most MAX_VALUES of them.

  Raises:
    ValueError: the payload is not an example, or has a feature above 4 MB with more than one value,
      which would take many times its bytes in memory.
  """
  try:
    features = _message('RawExample').FromString(payload).features.feature
    found = {}
    for name in features if names is None else names & features.keys():
      if len(features[name]) > _LARGE and not _is_one_value(features[name]):
        raise ValueError(f'feature {name!r} is too large')
      feature = _message('Feature').FromString(features[name])
      kind = feature.WhichOneof('kind')
      found[name] = list(getattr(feature, kind).value[:MAX_VALUES]) if kind else []
  except message.DecodeError as error:
    raise ValueError(f'not a tf.train.Example ({error})') from error
  return found


def names(payload: bytes) -> list[str]:
  """Returns the sorted names of the features of a serialised example, without parsing them."""
  return sorted(_message('RawExample').FromString(payload).features.feature)


def _is_one_value(feature: bytes) -> bool:
  """Whether a feature is a list of bytes with one value, or with little after the first."""
  start = 0
  for _ in range(2):  # the list in the feature, the value in the list: each has a tag and a length
    if feature[start] != 0x0A:
      return False
    size, shift, start = 0, 0, start + 1
    while shift < 64:
      byte = feature[start]
      size |= (byte & 0x7F) << shift
      shift, start = shift + 7, start + 1
      if byte < 0x80:
        break
  return start + size > len(feature) - 64
