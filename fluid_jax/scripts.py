"""The console scripts of an installed package: fluid-train and the others of setup.py."""

import importlib
from collections.abc import Callable

from fluid_jax import errors


def _script(module: str) -> Callable[[], None]:
  return lambda: errors.run(importlib.import_module(module).main)


train = _script('fluid_jax.main')
sample = _script('fluid_jax.sample.command')
prepare = _script('fluid_jax.prepare.command')
export = _script('fluid_jax.export')
aot = _script('fluid_jax.aot.command')
train_tokenizer = _script('fluid_jax.train_tokenizer.__main__')
