"""Ends training that cannot succeed, and names the examples that may be the cause.

A step whose result is not finite is skipped: it changes only the counters. `Monitor` reads these
counters and the loss a step late, so that no step waits for them.
"""

import contextlib
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fluid_jax import errors, metrics, optim, sharding, stop

READ_EVERY = 10  # steps between readings of the counters
WINDOW = 100  # steps
MAX_IN_A_ROW = 10  # skipped steps that end training
MAX_IN_WINDOW = 25
SPIKE = 10  # times the median loss of the window: a spike, which is reported
OUTLIER = 30  # times the median magnitude of a batch's examples: an outlier, which is reported
NOT_FINITE = 'are not finite'
_NUM_INSPECTED = 3  # batches that are read again to find what is wrong in them


class Monitor:
  """Watches the steps of a run. Each process makes one and calls it equally."""

  def __init__(
    self,
    job: Any,
    state: Any,
    where: str,
    data_state: Mapping[str, int],
    wait: Callable[[Callable[[], str]], str],
  ):
    """Checks the state that training starts from.

    Args:
      job: see `loop.Job`.
      state: before the first step.
      where: the origin of the state, for messages.
      data_state: integers that were saved with the state, see `data_state`.
      wait: calls a function that reads examples, see `stop.Stopper.wait`.

    Raises:
      UserError: the state is not finite (exit code 5).
    """
    self._job, self._wait = job, wait
    replicated = NamedSharding(job.mesh, PartitionSpec())
    self._is_finite = jax.jit(optim.is_finite, out_shardings=replicated)
    if not self._holds_finite(state):
      raise errors.UserError(
        f'{where} holds parameters that are not finite, so training cannot continue from it: '
        'remove it to continue from an earlier step, or give another --workdir.',
        errors.CORRUPT,
      )
    self._skips = int(data_state.get('skips', 0))  # a bit for each step of the window; 1: skipped
    self._num_skipped = int(jax.device_get(state.num_skipped))
    self._unread: list[tuple[int, jax.Array, jax.Array]] = []
    self._skipped_steps: deque[int] = deque(maxlen=WINDOW)
    self._losses: deque[float] = deque(maxlen=WINDOW)
    self._quiet_until: dict[str, int] = {}
    self._owes_save = False

  @property
  def data_state(self) -> dict[str, int]:
    """Integers to save with the state, so that a resumed run counts from where it stopped."""
    return {'skips': self._skips}

  def inspect(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
    """Reports examples whose latents are not finite or far larger than those of the others."""
    odd = outliers({name: batch[name] for name in ('image_moments',) if name in batch})
    if odd and self._is_time('examples', step):
      metrics.log(f'warning: step {step} reads {self._named(step, odd)}')

  def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Takes the metrics of a step that was dispatched; reads those of earlier steps now and then.

    Raises:
      UserError: too many steps were skipped (exit code 7).
    """
    if step % READ_EVERY == 0:
      self.read()
    self._unread.append((step, values['num_skipped'], values['loss']))

  def read(self) -> None:
    """Reads the metrics of all steps that were added; waits for the last one.

    Raises:
      UserError: too many steps were skipped (exit code 7).
    """
    unread, self._unread = self._unread, []
    for step, num_skipped, loss in jax.device_get(unread):
      is_skipped = int(num_skipped) > self._num_skipped
      self._num_skipped = int(num_skipped)
      self._skips = (self._skips << 1 | is_skipped) % (1 << WINDOW)
      if is_skipped:
        self._skipped_steps.append(step)
        self._check_skips(step)
      else:
        self._check_loss(step, float(loss))
    new = [step for step, *_ in unread if step in self._skipped_steps]
    if new and self._is_time('skipped', new[0]):
      metrics.log(
        f'warning: step {new[0]} was skipped because its loss, gradient or update is not finite; '
        f'it reads {self._examples(new[:1])}',
      )

  def may_save(self, step: int, state: Any, is_due: bool, is_last: bool) -> bool:
    """Whether to save the state after a step.

    A state whose last step was skipped has not changed, and may be why it was skipped. The save is
    then postponed to the next update, so that it replaces no good checkpoint.

    Args:
      step: number of the step that was added last.
      state: after the step.
      is_due: whether a save is due.
      is_last: whether training stops after this step.

    Raises:
      UserError: too many steps were skipped, or the state is not finite (exit code 7).
    """
    if not (is_due or is_last or self._owes_save):
      return False
    self.read()
    self._owes_save = self._skips % 2 == 1 and not is_last
    if not self._owes_save and not self._holds_finite(state):
      raise errors.UserError(
        f'the parameters of step {step} are not finite, so it was not saved: lower '
        'optimizer.learning_rate and start again from an earlier checkpoint.',
        errors.DIVERGED,
      )
    return not self._owes_save

  def _holds_finite(self, state: Any) -> bool:
    return bool(jax.device_get(self._is_finite((state.params, state.ema_params))))

  def _is_time(self, kind: str, step: int) -> bool:
    """Whether to print a warning of this kind: at most one per window."""
    if step < self._quiet_until.get(kind, 0):
      return False
    self._quiet_until[kind] = step + WINDOW
    return True

  def _check_skips(self, step: int) -> None:
    in_a_row = (self._skips ^ (self._skips + 1)).bit_length() - 1  # ones at the end
    is_over = in_a_row >= min(MAX_IN_A_ROW, self._job.config.train.num_steps)
    if not is_over and self._skips.bit_count() <= MAX_IN_WINDOW:
      return
    count = f'{in_a_row} steps in a row'
    if not is_over:
      count = f'{self._skips.bit_count()} of the last {WINDOW} steps'
    raise errors.UserError(
      f'{count}, up to step {step}, were skipped because their loss, gradient or update is not '
      f'finite; they read {self._examples(self._skipped_steps)}: repair or remove examples that '
      'are wrong, or lower optimizer.learning_rate; the checkpoints of earlier steps are kept.',
      errors.DIVERGED,
    )

  def _check_loss(self, step: int, loss: float) -> None:
    if len(self._losses) >= READ_EVERY:
      median = statistics.median(self._losses)
      if loss > SPIKE * abs(median) and self._is_time('loss', step):
        metrics.log(
          f'warning: the loss of step {step} is {loss:.4g}, and {median:.4g} in the median of the '
          f'{len(self._losses)} steps before it; it reads {self._examples([step])}'
        )
    self._losses.append(loss)

  def _examples(self, steps: Iterable[int]) -> str:
    """Names this process's examples of some steps that are outliers; all, if there are none.

    Nothing ends because they cannot be read, or because a stop signal arrives meanwhile.
    """
    try:
      return self._wait(lambda: self._read_examples(steps))
    except (errors.UserError, OSError, stop.Stopped):
      return 'examples that cannot be read now'

  def _read_examples(self, steps: Iterable[int]) -> str:
    found = {}
    steps = list(steps)[:_NUM_INSPECTED]
    for step in steps:
      with contextlib.suppress(errors.UserError, StopIteration):
        with contextlib.closing(self._job.open_stream(step - 1)) as stream:
          odd = outliers(next(stream))
        if odd:
          found |= self._by_key(step, odd)
    if found:
      return _listed(found)
    with contextlib.suppress(errors.UserError):
      return f'the examples {errors.and_more(self._keys(steps[0]), separator=", ")}'
    return 'unknown examples'

  def _named(self, step: int, odd: Mapping[int, str]) -> str:
    """As `_examples`, of examples that were read."""
    try:
      return self._wait(lambda: _listed(self._by_key(step, odd)))
    except (errors.UserError, OSError, stop.Stopped):
      return f'examples whose {" and ".join(sorted(set(odd.values())))}'

  def _by_key(self, step: int, odd: Mapping[int, str]) -> dict[str, str]:
    """Reasons by key instead of by row of this process."""
    keys = self._keys(step)
    rows = sharding.local_rows(self._job.mesh, len(keys))
    return {keys[rows[row]]: reason for row, reason in odd.items()}

  def _keys(self, step: int) -> list[str]:
    with contextlib.closing(self._job.open_stream(step - 1)) as stream:
      return stream.keys_at(step - 1)


def _listed(reasons: Mapping[str, str]) -> str:
  """'examples whose image_moments are not finite (a, b and 2 more)'."""
  keys = {}
  for key, reason in reasons.items():
    keys.setdefault(reason, []).append(key)
  parts = [f'{reason} ({errors.and_more(found, separator=", ")})' for reason, found in keys.items()]
  return f'examples whose {" and ".join(parts)}'


def outliers(batch: Mapping[str, np.ndarray]) -> dict[int, str]:
  """Rows of the floating-point arrays of a batch that are not finite or far from the others.

  Returns:
    What is wrong with a row, by row.
  """
  found = {}
  for name, array in batch.items():
    if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != 'bfloat16':
      continue
    # Means of latents; their logarithmic variances have another scale.
    scaled = array[..., : array.shape[-1] // 2] if name == 'image_moments' else array
    axes = tuple(range(1, array.ndim))
    largest_B = np.maximum(scaled.max(axes), -scaled.min(axes)).astype(np.float32)
    is_finite_B = np.isfinite(array.sum(axes, dtype=np.float32))
    typical = np.median(largest_B[is_finite_B]) if is_finite_B.any() else 0
    for row in np.flatnonzero(~is_finite_B):
      found[int(row)] = f'{name} {NOT_FINITE}'
    for row in np.flatnonzero(is_finite_B & (largest_B > OUTLIER * typical) & (typical > 0)):
      found[int(row)] = f'{name} are over {OUTLIER} times larger than is usual'
  return found
