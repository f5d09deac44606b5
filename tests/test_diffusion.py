"""Tests the diffusion chain, its loss and its sampler against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fluid_jax.models import diffusion

STEPS = [2, 7, 10, 100, 250, 1000]
TIMES = np.array([0, 0, 1, 2, 3, 50, 300, 500, 700, 990, 997, 998, 999, 999])

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def chains(num_steps):
  """The respaced chain of fluid_jax and that of the reference."""
  chain = reference.Diffusion(reference.cosine_betas())
  short = reference.respace(chain, reference.respaced_timesteps(num_steps))
  return diffusion.cosine_diffusion().respaced(num_steps), short


def loss_inputs():
  """x_0, the noise, and a network's outputs eps and v, each (N, C)."""
  return np.random.default_rng(0).normal(size=(4, len(TIMES), 5))


@pytest.mark.parametrize('num_steps', STEPS)
def test_tables_match_reference(num_steps):
  chain, reference_chain = chains(num_steps)
  np.testing.assert_array_equal(chain.timesteps, reference_chain.timesteps)
  close(chain.alphas_cumprod, reference_chain.alphas_cumprod)
  close(chain.betas, reference_chain.betas)
  close(chain.posterior_variance, reference_chain.posterior_variance)
  low, high = chain.log_variance_range
  close(low, reference_chain.posterior_log_variance_clipped)
  close(high, reference_chain.log_betas)


def test_respacing_to_all_steps_changes_nothing():
  chain = diffusion.cosine_diffusion()
  np.testing.assert_array_equal(chain.respaced(1000).timesteps, np.arange(1000))
  np.testing.assert_array_equal(chain.respaced(1000).betas, chain.betas)


@pytest.mark.parametrize('num_steps', [0, 1, 1001])
def test_invalid_respacing_raises(num_steps):
  with pytest.raises(ValueError, match=r'not within 2\.\.1000'):
    diffusion.cosine_diffusion().respaced(num_steps)


@pytest.mark.usefixtures('x64')
def test_adding_noise_matches_reference():
  chain, reference_chain = chains(1000)
  x0, noise, _, _ = loss_inputs()
  x_t = chain.add_noise(jnp.asarray(x0), jnp.asarray(noise), TIMES)
  close(x_t, reference_chain.q_sample(x0, TIMES, noise))


@pytest.mark.usefixtures('x64')
def test_loss_and_gradients_match_reference():
  chain, reference_chain = chains(1000)
  x0, noise, eps, v = loss_inputs()
  mse, vlb = chain.losses(jnp.asarray(eps), jnp.asarray(v), noise, TIMES)
  expected_mse, expected_vlb = reference.diffusion_loss(reference_chain, x0, TIMES, noise, eps, v)
  close(mse, expected_mse, rtol=1e-6)
  close(vlb, expected_vlb, rtol=1e-6)

  def total(eps, v):
    mse, vlb = chain.losses(eps, v, noise, TIMES)
    return (mse + vlb).sum()

  gradients = jax.grad(total, argnums=(0, 1))(eps, v)
  expected_gradients = reference.diffusion_loss_gradients(reference_chain, x0, TIMES, noise, eps, v)
  for gradient, expected in zip(gradients, expected_gradients, strict=True):
    close(gradient, expected, rtol=1e-6)


def test_float32_loss_is_close_to_float64_reference():
  chain, reference_chain = chains(1000)
  x0, noise, eps, v = loss_inputs()
  single = (jnp.asarray(a, jnp.float32) for a in (eps, v, noise))
  for loss, expected in zip(
    chain.losses(*single, TIMES),
    reference.diffusion_loss(reference_chain, x0, TIMES, noise, eps, v),
    strict=True,
  ):
    assert loss.dtype == jnp.float32
    close(loss, expected, rtol=2e-5)


def run_sampler(chain, model, initial, noises, temperature, dtype):
  """Runs the reverse process as sampling does: a scan over precomputed constants."""

  def step(x, inputs):
    t, constants, noise = inputs
    eps, v = model(x, t)
    return diffusion.reverse_step(x, eps, v, noise, constants, temperature), None

  constants = chain.step_constants(dtype)
  inputs = jnp.asarray(chain.timesteps[::-1]), constants, jnp.asarray(noises, dtype)
  return jax.lax.scan(step, jnp.asarray(initial, dtype), inputs)[0]


def wavy(x, t, np=np):
  """A bounded stand-in for a network: it mixes channels and depends on the timestep."""
  mixed = x + 0.5 * x[:, ::-1] + t * 0.002
  return np.sin(mixed), np.cos(2 * mixed)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('temperature', [0.0, 0.9, 1.0])
@pytest.mark.parametrize('num_steps', [2, 10, 100])
def test_sampler_matches_reference(num_steps, temperature):
  chain, reference_chain = chains(num_steps)
  rng = np.random.default_rng(1)
  initial, noises = rng.normal(size=(6, 4)), rng.normal(size=(num_steps, 6, 4))
  model = functools.partial(wavy, np=jnp)
  x = run_sampler(chain, model, initial, noises, temperature, jnp.float64)
  close(x, reference.sample(reference_chain, wavy, initial, noises, temperature), rtol=1e-6)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('num_steps', STEPS)
def test_exact_noise_predictions_recover_the_data(num_steps, temperature):
  chain, _ = chains(num_steps)
  rng = np.random.default_rng(2)
  x0, initial = rng.normal(size=(2, 6, 4))
  noises = rng.normal(size=(num_steps, 6, 4))
  alpha_bar = jnp.asarray(diffusion.cosine_diffusion().alphas_cumprod)

  def exact(x, t):
    return (x - jnp.sqrt(alpha_bar[t]) * x0) / jnp.sqrt(1 - alpha_bar[t]), jnp.zeros_like(x)

  x = run_sampler(chain, exact, initial, noises, temperature, jnp.float64)
  close(x, x0, rtol=1e-6, atol=1e-6)


def test_only_the_initial_noise_matters_at_temperature_0():
  chain, _ = chains(10)
  rng = np.random.default_rng(3)
  initial, other = rng.normal(size=(2, 6, 4))
  noises, others = rng.normal(size=(2, 10, 6, 4))
  run = functools.partial(run_sampler, chain, functools.partial(wavy, np=jnp), dtype=jnp.float32)
  x = run(initial, noises, temperature=0.0)
  np.testing.assert_array_equal(run(initial, others, temperature=0.0), x)
  assert np.abs(run(other, noises, temperature=0.0) - x).max() > 0.1
  assert np.abs(run(initial, others, temperature=1.0) - x).max() > 0.1
  # The last step adds no noise at any temperature.
  others[:-1] = noises[:-1]
  x = run(initial, noises, temperature=1.0)
  np.testing.assert_array_equal(run(initial, others, temperature=1.0), x)
