"""Reads what the TPU compiler made: FLOPs, collectives and a timeline, loops multiplied out.

The compiler's own totals count the body of a loop once, and a stack of layers is a loop. So the
scheduled program's text is read instead: an instruction's trip count is that of the loops around
it, its cycles are the compiler's estimate, and a collective's time is its bytes over the links.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16,
  's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64, 'token': 0,
}  # fmt: skip
_COMPUTATION = re.compile(r'(ENTRY )?%([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%([\w.\-]+) = (.+)')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLS = re.compile(r'(?:calls|to_apply|body|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_GROUPS = re.compile(r'replica_groups=(\{\{[\d,{} ]*\}\}|\[[^ ]*|mesh\[[^\]]*\].*?\{[^}]*\})')
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BETWEEN_SLICES = ' between slices'  # ends the kind of a collective over the data-centre network
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.\-]+)', self.rest[: self.rest.index(')')])

  @property
  def called(self) -> list[str]:
    """The computations that it runs."""
    return [name for group in _CALLS.findall(self.rest) for name in re.findall(r'[\w.\-]+', group)]

  @property
  def cycles(self) -> int:
    """The compiler's estimate; 0 where it makes none."""
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found else 0

  @property
  def source(self) -> str:
    """The path of the JAX operation it came from."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, each its instructions in the order in which they are issued."""

  computations: Mapping[str, Sequence[Instruction]]
  entry: str


@dataclasses.dataclass
class Collective:
  """All runs of one kind of collective in a step, on one device."""

  count: int = 0
  bytes: float = 0.0
  asynchronous: int = 0  # runs that compute goes on beside
  seconds: float = 0.0
  exposed_seconds: float = 0.0  # while nothing else ran


@dataclasses.dataclass
class Timeline:
  """A step on one device."""

  compute_seconds: float
  collectives: dict[str, Collective]
  seconds_by_source: collections.Counter

  @property
  def exposed_seconds(self) -> float:
    return sum(c.exposed_seconds for c in self.collectives.values())

  @property
  def seconds(self) -> float:
    return self.compute_seconds + self.exposed_seconds


def parse(text: str) -> Module:
  """A scheduled HLO module from `compiled.as_text()`."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if current is None:
      header = _COMPUTATION.match(line)
      if header:
        current = computations[header[2]] = []
        entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif found := _INSTRUCTION.match(line):
      current.append(_instruction(found[1], found[2]))
  return Module(computations, entry)


def _instruction(name: str, body: str) -> Instruction:
  end = body.index(' ')
  if body[0] == '(':  # a tuple, whose own blanks and brackets nest
    depth = 0
    for end, character in enumerate(body, 1):  # noqa: B007
      depth += (character == '(') - (character == ')')
      if not depth:
        break
  shape, call = body[:end], body[end:].lstrip()
  opcode, _, _ = call.partition('(')
  return Instruction(name, shape, opcode, call[len(opcode) :])


def flops(program: Module) -> float:
  """FLOPs of all matrix products of one run; a multiply-add counts two."""
  memo: dict[str, float] = {}

  def of(name: str) -> float:
    if name not in memo:
      memo[name] = 0.0
      shapes = {i.name: i.shape for i in program.computations[name]}
      total = 0.0
      for instruction in program.computations[name]:
        if instruction.opcode in ('convolution', 'dot'):
          total += _product_flops(instruction, shapes)
        else:
          trips = trip_count(program, instruction) if instruction.opcode == 'while' else 1
          total += trips * sum(of(called) for called in instruction.called)
      memo[name] = total
    return memo[name]

  return of(program.entry)


def trip_count(program: Module, loop: Instruction) -> int:
  """How often a `while` runs: the bound in its condition (scans count from 0 by 1)."""
  condition = re.search(r'condition=%([\w.\-]+)', loop.rest)[1]
  bounds = [
    int(re.match(r'\((\d+)\)', i.rest)[1])
    for i in program.computations[condition]
    if i.opcode == 'constant' and i.shape.startswith('s32')
  ]
  return max(bounds, default=1)


def num_bytes(shape: str) -> float:
  """Bytes of an array or tuple of them, without the padding of its layout."""
  return sum(_BITS.get(kind, 32) / 8 * math.prod(_dims(d)) for kind, d in _SHAPE.findall(shape))


def _dims(text: str) -> list[int]:
  return [int(d) for d in text.split(',') if d]


def _product_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  """2 x outputs x multiply-adds each; TPU programs write products as convolutions."""
  out = _dims(_SHAPE.search(instruction.shape)[2])
  lhs, rhs = (_dims(_SHAPE.search(shapes[name])[2]) for name in instruction.operands[:2])
  if instruction.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)[1]
    return 2.0 * math.prod(out) * math.prod(lhs[d] for d in _dims(contracted))
  left, right, result = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest).groups()
  total = 2.0 * math.prod(out) * rhs[right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', instruction.rest)
  if window:

    def field(name: str, default: int) -> list[str]:
      found = re.search(rf'\b{name}=([\d_x\-]+)', window[1])
      return found[1].split('x') if found else [str(default)] * len(sizes)

    sizes = re.search(r'size=([\dx]+)', window[1])[1].split('x')
    strides, pads = field('stride', 1), field('pad', 0)
    spreads, steps = field('lhs_dilate', 1), field('rhs_dilate', 1)
    for axis, size in enumerate(map(int, sizes)):
      # Windows reach beyond the input, where nothing is multiplied: count the pairs that meet.
      width, places = lhs[left.index(str(axis))], out[result.index(str(axis))]
      spread = int(spreads[axis])
      at = (
        np.arange(places)[:, None] * int(strides[axis])
        + np.arange(size) * int(steps[axis])
        - int(pads[axis].split('_')[0])
      )
      meets = (at >= 0) & (at <= (width - 1) * spread) & (at % spread == 0)
      total *= meets.sum() / places
  return total


def timeline(
  program: Module,
  clock_hz: float,
  collective_seconds: Callable[[str, float, np.ndarray | None], float],
) -> Timeline:
  """Plays the schedule: one thing computes at a time, one collective at a time beside it.

  Collectives between slices have a network, and so a queue, of their own.

  Args:
    program: from `parse`.
    clock_hz: cycles a second.
    collective_seconds: (kind, bytes of the whole array, device groups or None) to seconds.
  """
  result = Timeline(0.0, collections.defaultdict(Collective), collections.Counter())

  def play(name: str, runs: int) -> float:
    """Seconds of one run of a computation; adds `runs` of it to the result."""
    now = 0.0
    free = {False: (0.0, ''), True: (0.0, '')}  # between slices?: when free again, after what kind
    pending: dict[str, tuple[float, str]] = {}
    for instruction in program.computations[name]:
      if instruction.opcode == 'while':
        trips = trip_count(program, instruction)
        body = re.search(r'body=%([\w.\-]+)', instruction.rest)[1]
        now += trips * play(body, runs * trips)
        continue
      if instruction.opcode in ('call', 'conditional'):
        now += max((play(called, runs) for called in instruction.called), default=0.0)
        continue
      role, found = _collective(program, instruction)
      if role == 'done':
        started = _started(instruction, pending)
        if started:
          end, kind = pending.pop(started)
          exposed = max(0.0, end - now)
          result.collectives[kind].exposed_seconds += runs * exposed
          now += exposed
        continue
      if found is not None:
        kind, size, groups = found
        seconds = collective_seconds(kind, size, groups)
        entry = result.collectives[kind]
        entry.count += runs
        entry.bytes += runs * size
        entry.seconds += runs * seconds
        network = kind.endswith(BETWEEN_SLICES)
        free_at, before = free[network]
        end = max(now, free_at) + seconds
        free[network] = end, kind
        if role == 'start':
          entry.asynchronous += runs
          pending[instruction.name] = end, kind
        else:
          if free_at > now:  # it waits for the links, which is the fault of what holds them
            result.collectives[before].exposed_seconds += runs * (free_at - now)
          entry.exposed_seconds += runs * seconds
          now = end
        continue
      seconds = instruction.cycles / clock_hz
      now += seconds
      result.compute_seconds += runs * seconds
      result.seconds_by_source[instruction.source] += runs * seconds
    return now

  play(program.entry, 1)
  result.collectives = dict(result.collectives)
  return result


def _started(done: Instruction, pending: Mapping[str, tuple[float, str]]) -> str | None:
  """Which start a `done` waits for; None if what was started is no collective.

  It is the one that `done` names as operand, or, of a transfer between slices, as predecessor. A
  fusion names none where compute lies between: it ends the oldest within the slice.
  """
  named = re.search(r'control-predecessors=\{([^}]*)\}', done.rest)
  predecessors = re.findall(r'[\w.\-]+', named[1]) if named else []
  for name in (*done.operands, *predecessors):
    if name in pending:
      return name
  if done.opcode != 'fusion':
    return None
  return next((n for n, (_, kind) in pending.items() if not kind.endswith(BETWEEN_SLICES)), None)


def _collective(
  program: Module, instruction: Instruction
) -> tuple[str, tuple[str, float, np.ndarray | None] | None]:
  """What part an instruction has in a collective, and of which.

  Returns:
    'start', 'done', 'whole' or '' (none); and kind, bytes of the whole (gathered, unreduced) array
    and device groups, where it begins one.
  """
  opcode = instruction.opcode
  kind = opcode.removesuffix('-start').removesuffix('-done')
  if kind in KINDS:
    if opcode.endswith('-done'):
      return 'done', None
    whole = kind, _whole_bytes(kind, instruction), device_groups(instruction.rest)
    return ('start' if opcode.endswith('-start') else 'whole'), whole
  if opcode in ('call-done', 'recv-done'):  # of what sparse cores do; of what hosts send
    return 'done', None
  if opcode == 'send' and (transfer := _TRANSFER.search(instruction.rest)):
    array = _SHAPE.search(instruction.shape)[0]
    kind = transfer[1].lower().replace('_', '-') + BETWEEN_SLICES
    return 'start', (kind, num_bytes(array), None)
  if opcode not in ('fusion', 'call-start'):
    return '', None
  # Without sparse cores a gather is a fusion that starts it, products whose fusions carry it on
  # (compute like any other), and a fusion that ends it. A reduce-scatter is a fusion around an
  # all-reduce.
  inner = [i for called in instruction.called for i in program.computations.get(called, ())]
  if any('custom_call_target="AsyncCollectiveDone"' in i.rest for i in inner):
    return 'done', None
  if opcode == 'fusion' and instruction.cycles:
    return '', None
  starts = any('custom_call_target="AsyncCollectiveStart"' in i.rest for i in inner)
  for part in inner:
    kind = part.opcode.removesuffix('-start')
    if kind in KINDS:
      whole = _whole_bytes(kind, part), device_groups(part.rest)
      if opcode == 'fusion' and kind == 'all-reduce':
        kind = 'reduce-scatter'
      return ('start' if starts or opcode == 'call-start' else 'whole'), (kind, *whole)
  return '', None


def _whole_bytes(kind: str, instruction: Instruction) -> float:
  if kind == 'reduce-scatter':
    groups = device_groups(instruction.rest)
    return num_bytes(instruction.shape) * (1 if groups is None else groups.shape[1])
  if instruction.opcode.endswith('-start') and instruction.shape.startswith('(('):
    return num_bytes(instruction.shape.split('), ', 1)[-1])  # (operands, results)
  return num_bytes(instruction.shape)


def device_groups(attributes: str) -> np.ndarray | None:
  """(groups, size) numbers of the devices that take part together; None if not understood."""
  found = _GROUPS.search(attributes)
  if not found:
    return None
  text = found[1]
  if text.startswith('{{'):
    rows = [[int(d) for d in row.split(',')] for row in re.findall(r'\{([\d, ]+)\}', text)]
    return np.array(rows) if len({len(row) for row in rows}) == 1 else None
  if text.startswith('['):  # [groups,size]<=[dims]T(order)
    shape, dims = (_dims(d) for d in re.findall(r'\[([\d,]+)\]', text)[:2])
    return _numbers(dims, text).reshape(shape)
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
  members = re.findall(r"'(\w+)'", text[text.rindex('{') :])
  if ':' in text[text.rindex('{') :]:  # parts of an axis
    return None
  listed = re.search(r'device_ids=\(\[([\d,]+)\]', text)
  dims = _dims(listed[1]) if listed else list(sizes.values())
  numbers = _numbers(dims, text).reshape(list(sizes.values()))
  axes = [list(sizes).index(name) for name in members]
  numbers = np.moveaxis(numbers, axes, range(-len(axes), 0))
  return numbers.reshape(-1, math.prod(sizes[name] for name in members))


def _numbers(dims: list[int], text: str) -> np.ndarray:
  order = re.search(r'T\(([\d,]+)\)', text)
  numbers = np.arange(math.prod(dims)).reshape(dims)
  return numbers.transpose(_dims(order[1])) if order else numbers
