"""Computes FLOPs, collectives and a timeline from the text of a compiled program.

The totals of the compiler count the body of a loop once, but the stack of layers is a loop. This
module therefore reads the text of the scheduled program. It multiplies each instruction by the trip
counts of its loops. Compute time is the compiler's estimate of cycles; the time of a collective is
its bytes divided by the bandwidth of its links.
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
BETWEEN_SLICES = ' between slices'  # suffix of kinds that use the data-centre network
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
    """Names of the computations that it runs."""
    return [name for group in _CALLS.findall(self.rest) for name in re.findall(r'[\w.\-]+', group)]

  @property
  def cycles(self) -> int:
    """The compiler's estimate; 0 if there is none."""
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found else 0

  @property
  def source(self) -> str:
    """Path of the JAX operation that it was compiled from."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class Module:
  """A scheduled program: computations by name, with their instructions in order of issue."""

  computations: Mapping[str, Sequence[Instruction]]
  entry: str


@dataclasses.dataclass
class Collective:
  """Totals of one kind of collective in one step, on one device."""

  count: int = 0
  bytes: float = 0.0
  asynchronous: int = 0  # runs that may overlap with compute
  seconds: float = 0.0
  exposed_seconds: float = 0.0  # not hidden by compute


@dataclasses.dataclass
class Timeline:
  """One step on one device."""

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
  """Parses a scheduled HLO module, the result of `compiled.as_text()`."""
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
  if body[0] == '(':  # a tuple shape: find its closing bracket
    depth = 0
    for end, character in enumerate(body, 1):  # noqa: B007
      depth += (character == '(') - (character == ')')
      if not depth:
        break
  shape, call = body[:end], body[end:].lstrip()
  opcode, _, _ = call.partition('(')
  return Instruction(name, shape, opcode, call[len(opcode) :])


def flops(module: Module) -> float:
  """FLOPs of all matrix products in one run; a multiply-add counts as two."""
  memo: dict[str, float] = {}

  def of(name: str) -> float:
    if name not in memo:
      memo[name] = 0.0
      shapes = {i.name: i.shape for i in module.computations[name]}
      total = 0.0
      for instruction in module.computations[name]:
        if instruction.opcode in ('convolution', 'dot'):
          total += _product_flops(instruction, shapes)
        else:
          trips = trip_count(module, instruction) if instruction.opcode == 'while' else 1
          total += trips * sum(of(called) for called in instruction.called)
      memo[name] = total
    return memo[name]

  return of(module.entry)


def trip_count(module: Module, loop: Instruction) -> int:
  """Trip count of a `while`: the bound in its condition (JAX's scans count from 0 by 1)."""
  condition = re.search(r'condition=%([\w.\-]+)', loop.rest)[1]
  bounds = [
    int(re.match(r'\((\d+)\)', i.rest)[1])
    for i in module.computations[condition]
    if i.opcode == 'constant' and i.shape.startswith('s32')
  ]
  return max(bounds, default=1)


def num_bytes(shape: str) -> float:
  """Bytes of an array or a tuple of arrays, without the padding of their layouts."""
  return sum(_BITS.get(kind, 32) / 8 * math.prod(_dims(d)) for kind, d in _SHAPE.findall(shape))


def _dims(text: str) -> list[int]:
  return [int(d) for d in text.split(',') if d]


def _product_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  """2 x outputs x multiply-adds per output. TPU programs contain products as convolutions."""
  out = _dims(_SHAPE.search(instruction.shape)[2])
  lhs, rhs = (_dims(_SHAPE.search(shapes[name])[2]) for name in instruction.operands[:2])
  if instruction.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)[1]
    return 2.0 * math.prod(out) * math.prod(lhs[d] for d in _dims(contracted))
  left, right, result = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest).groups()
  total = 2.0 * math.prod(out) * rhs[right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', instruction.rest)
  if window:
    sizes = [int(size) for size in re.search(r'size=([\dx]+)', window[1])[1].split('x')]
    for axis, size in enumerate(sizes):
      input_size, output_size = lhs[left.index(str(axis))], out[result.index(str(axis))]
      total *= _window_pairs(window[1], axis, size, input_size, output_size) / output_size
  return total


def _window_pairs(window: str, axis: int, size: int, input_size: int, output_size: int) -> int:
  """Multiply-adds of a convolution along one axis, for all output positions.

  Parts of a window that fall on padding or on holes of a dilated input need no multiplication.
  """

  def field(name: str, default: int) -> int:
    found = re.search(rf'\b{name}=([\d_x\-]+)', window)
    return int(found[1].split('x')[axis].split('_')[0]) if found else default

  dilation = field('lhs_dilate', 1)
  position = (
    np.arange(output_size)[:, None] * field('stride', 1)
    + np.arange(size) * field('rhs_dilate', 1)
    - field('pad', 0)
  )
  is_input = (
    (position >= 0) & (position <= (input_size - 1) * dilation) & (position % dilation == 0)
  )
  return int(is_input.sum())


def timeline(
  module: Module,
  clock_hz: float,
  collective_seconds: Callable[[str, float, np.ndarray | None], float],
) -> Timeline:
  """Simulates the schedule: one operation computes at a time, together with at most one collective.

  Collectives between slices use another network and therefore have their own queue.

  Args:
    module: from `parse`.
    clock_hz: cycles per second.
    collective_seconds: returns the seconds of a collective from its kind, the bytes of the full
      array, and its device groups (see `device_groups`) or None.
  """
  simulation = _Simulation(module, clock_hz, collective_seconds)
  simulation.run(module.entry, 1)
  result = simulation.timeline
  result.collectives = dict(result.collectives)
  return result


class _Simulation:
  """Adds up a timeline while it runs the computations of a module."""

  def __init__(
    self,
    module: Module,
    clock_hz: float,
    collective_seconds: Callable[[str, float, np.ndarray | None], float],
  ):
    self.timeline = Timeline(0.0, collections.defaultdict(Collective), collections.Counter())
    self._module = module
    self._clock_hz = clock_hz
    self._collective_seconds = collective_seconds

  def run(self, name: str, runs: int) -> float:
    """Adds `runs` runs of a computation to the timeline; returns the seconds of one run."""
    now = 0.0
    # By whether the network is that between slices: when it is free again, and the last kind on it.
    free = {False: (0.0, ''), True: (0.0, '')}
    pending: dict[str, tuple[float, str]] = {}  # end and kind of collectives that have started
    for instruction in self._module.computations[name]:
      if instruction.opcode == 'while':
        trips = trip_count(self._module, instruction)
        body = re.search(r'body=%([\w.\-]+)', instruction.rest)[1]
        now += trips * self.run(body, runs * trips)
        continue
      if instruction.opcode in ('call', 'conditional'):
        now += max((self.run(called, runs) for called in instruction.called), default=0.0)
        continue
      role, found = _collective(self._module, instruction)
      if role == 'done':
        started = _started(instruction, pending)
        if started:
          end, kind = pending.pop(started)
          exposed = max(0.0, end - now)
          self.timeline.collectives[kind].exposed_seconds += runs * exposed
          now += exposed
      elif found is not None:
        end = self._communicate(found, role == 'start', runs, now, free)
        if role == 'start':
          pending[instruction.name] = end, found[0]
        else:
          now = end
      else:
        seconds = instruction.cycles / self._clock_hz
        now += seconds
        self.timeline.compute_seconds += runs * seconds
        self.timeline.seconds_by_source[instruction.source] += runs * seconds
    return now

  def _communicate(
    self,
    found: tuple[str, float, np.ndarray | None],
    is_asynchronous: bool,
    runs: int,
    now: float,
    free: dict[bool, tuple[float, str]],
  ) -> float:
    """Queues a collective on its network; returns when it ends."""
    kind, size, groups = found
    seconds = self._collective_seconds(kind, size, groups)
    entry = self.timeline.collectives[kind]
    entry.count += runs
    entry.bytes += runs * size
    entry.seconds += runs * seconds
    network = kind.endswith(BETWEEN_SLICES)
    free_at, previous = free[network]
    end = max(now, free_at) + seconds
    free[network] = end, kind
    if is_asynchronous:
      entry.asynchronous += runs
    else:
      if free_at > now:  # the wait for the network counts for the kind that occupies it
        self.timeline.collectives[previous].exposed_seconds += runs * (free_at - now)
      entry.exposed_seconds += runs * seconds
    return end


def _started(done: Instruction, pending: Mapping[str, tuple[float, str]]) -> str | None:
  """Name of the start that a `done` waits for, or None if it does not belong to a collective.

  A `done` has its start as an operand or, for a transfer between slices, as a control predecessor.
  A fusion has neither if compute is fused in between; it ends the oldest collective of the slice.
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
  module: Module, instruction: Instruction
) -> tuple[str, tuple[str, float, np.ndarray | None] | None]:
  """Role of an instruction in a collective.

  Returns:
    'start', 'done', 'synchronous', or '' if it is not part of a collective. For the first and the
    third also the kind, the bytes of the full (gathered, unreduced) array, and the device groups.
  """
  opcode = instruction.opcode
  kind = opcode.removesuffix('-start').removesuffix('-done')
  if kind in KINDS:
    if opcode.endswith('-done'):
      return 'done', None
    found = kind, _full_bytes(kind, instruction), device_groups(instruction.rest)
    return ('start' if opcode.endswith('-start') else 'synchronous'), found
  if opcode in ('call-done', 'recv-done'):  # on sparse cores; from the hosts
    return 'done', None
  if opcode == 'send' and (transfer := _TRANSFER.search(instruction.rest)):
    array = _SHAPE.search(instruction.shape)[0]
    kind = transfer[1].lower().replace('_', '-') + BETWEEN_SLICES
    return 'start', (kind, num_bytes(array), None)
  if opcode not in ('fusion', 'call-start'):
    return '', None
  # Without sparse cores, one fusion starts a gather, fusions of matrix products continue it (they
  # count as compute), and one fusion ends it. A reduce-scatter is a fusion around an all-reduce.
  inner = [i for called in instruction.called for i in module.computations.get(called, ())]
  if any('custom_call_target="AsyncCollectiveDone"' in i.rest for i in inner):
    return 'done', None
  if opcode == 'fusion' and instruction.cycles:
    return '', None
  starts = any('custom_call_target="AsyncCollectiveStart"' in i.rest for i in inner)
  for part in inner:
    kind = part.opcode.removesuffix('-start')
    if kind in KINDS:
      rest = _full_bytes(kind, part), device_groups(part.rest)
      if opcode == 'fusion' and kind == 'all-reduce':
        kind = 'reduce-scatter'
      role = 'start' if starts or opcode == 'call-start' else 'synchronous'
      return role, (kind, *rest)
  return '', None


def _full_bytes(kind: str, instruction: Instruction) -> float:
  if kind == 'reduce-scatter':
    groups = device_groups(instruction.rest)
    return num_bytes(instruction.shape) * (1 if groups is None else groups.shape[1])
  if instruction.opcode.endswith('-start') and instruction.shape.startswith('(('):
    return num_bytes(instruction.shape.split('), ', 1)[-1])  # (operands, results)
  return num_bytes(instruction.shape)


def device_groups(attributes: str) -> np.ndarray | None:
  """(groups, size) numbers of the devices that communicate; None if the format is not supported."""
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
