"""`tf.train.Example` as bytes and back, without TensorFlow.

Workers of `data.ingest` would each take 4 s and 700 MB to import it. The message is described to
protobuf as in https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example, in a
pool of its own, so that TensorFlow may be imported too.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_LISTS = {  # field of Feature -> its number, and the type of its values
  'bytes_list': (1, 'TYPE_BYTES'),
  'float_list': (2, 'TYPE_FLOAT'),
  'int64_list': (3, 'TYPE_INT64'),
}


@functools.cache
def _example() -> type[message.Message]:
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
  features = proto.message_type.add(name='Features')
  entry = features.nested_type.add(name='FeatureEntry')
  entry.options.map_entry = True
  add(entry, 'key', 1, 'TYPE_STRING')
  add(entry, 'value', 2, 'Feature')
  add(features, 'feature', 1, 'Features.FeatureEntry', is_repeated=True)
  add(proto.message_type.add(name='Example'), 'features', 1, 'Features')
  pool = descriptor_pool.DescriptorPool()
  pool.Add(proto)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('tensorflow.Example'))


def encode(features: dict[str, Any]) -> bytes:
  """Serialises an example, the same bytes for the same features.

  Args:
    features: bytes, text, integers and floats, or lists of them of one type.
  """
  example = _example()()
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


def decode(payload: bytes) -> dict[str, list]:
  """The features of a serialised example as lists of bytes, integers or floats.

  Raises:
    ValueError: it is none.
  """
  try:
    features = _example().FromString(payload).features.feature
  except message.DecodeError as error:
    raise ValueError(f'no tf.train.Example ({error})') from error
  kinds = {name: feature.WhichOneof('kind') for name, feature in features.items()}
  return {
    name: list(getattr(features[name], kind).value) if kind else [] for name, kind in kinds.items()
  }
