"""Stop signals: SIGTERM and Ctrl-C (SIGINT) end a run after its state is saved, in every phase."""

import concurrent.futures
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from jax.experimental import multihost_utils

from fluid_jax import distributed, errors, metrics

T = TypeVar('T')
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.1


class Stopped(Exception):
  """A stop signal has arrived. What was running is abandoned."""


class Stopper:
  """Says when to stop: at once in one process, at the same poll in all of several processes.

  In a single process a signal raises `Stopped` in the main thread wherever it is. After `defer`, it
  does so only in `poll` and `wait`, so that the state of training is never half updated. A second
  signal of the same kind ends the process immediately.
  """

  def __init__(self, is_listening: bool):
    """See `run`."""
    self._is_listening = is_listening  # signals reach Python, and the main thread runs this
    self._is_shared = distributed.count() > 1
    self._received = ''
    self._is_deferred = False
    self._num_polls = 0

  def defer(self) -> None:
    """From now on, only `poll` and `wait` raise `Stopped`."""
    self._is_deferred = True

  def poll(self) -> None:
    """Raises `Stopped` if a signal has arrived.

    Every process of a run calls this equally often; all of them raise in the same call.
    """
    if self._is_shared:
      self._num_polls += 1
      if multihost_utils.reached_preemption_sync_point(self._num_polls):
        raise Stopped('SIGTERM')
    elif self._received:
      raise Stopped(self._received)

  def wait(self, call: Callable[[], T]) -> T:
    """Returns `call()`; in a single process a signal raises `Stopped` before it is finished.

    The call then runs in a thread, which is abandoned: a read from a dead disk, or a computation,
    cannot be cancelled.
    """
    if self._is_shared or not self._is_listening:
      return call()
    if self._received:
      raise Stopped(self._received)
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
      try:
        future.set_result(call())
      except BaseException as error:
        future.set_exception(error)

    threading.Thread(target=run, daemon=True, name='stoppable').start()
    while not concurrent.futures.wait([future], _POLL_S).done:
      if self._received:
        raise Stopped(self._received)
    return future.result()

  def on_signal(self, number: int, frame: Any) -> None:
    """The handler of both signals."""
    name = signal.Signals(number).name
    signal.signal(number, _default(number))
    if not self._is_shared:
      self._received = name
    # Not print, which the signal may have interrupted. Ctrl-C may also have ended the reader.
    with contextlib.suppress(OSError):
      os.write(2, f'{name} received: stopping; a second one ends without saving.\n'.encode())
    if self._is_shared:  # JAX tells the other processes
      os.kill(os.getpid(), signal.SIGTERM)
    elif not self._is_deferred:
      raise Stopped(name)


def run(train: Callable[[Stopper], int]) -> int:
  """Calls `train` while SIGTERM and SIGINT are handled; returns its exit code.

  Outside the main thread Python receives no signals, and nothing changes.

  Returns:
    42 if `train` was stopped when it had nothing to save.
  """
  is_main_thread = threading.current_thread() is threading.main_thread()
  stopper = Stopper(is_main_thread)
  # In several processes JAX handles SIGTERM, which any of them may receive. A signal that is
  # ignored stays so: a shell script starts its background jobs like this.
  handled = _SIGNALS[distributed.count() > 1 :] if is_main_thread else ()
  handled = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
  before = {}
  try:
    for number in handled:
      before[number] = signal.signal(number, stopper.on_signal)
    return train(stopper)
  except Stopped as name:
    stopper.defer()
    metrics.log(f'stopped by {name}: run the same command again')
    return errors.PREEMPTED
  finally:
    stopper.defer()
    for number, handler in before.items():
      signal.signal(number, handler)


def _default(number: int) -> Any:
  return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
