"""The model: layers, orders, heads, diffusion, Fluid itself and its sampler.

Nothing here imports data, sharding or training code. Arrays carry their shape in their name:
  B batch, L image tokens, C token channels, T text length, D width, H heads, K head dimension,
  N positions being read or drawn, M keys, R packed rows (positions of a whole group of examples),
  S noise draws per token, W width of the diffusion head.
"""
