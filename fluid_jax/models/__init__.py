"""The model: layers, orders, heads, diffusion, Fluid, and sampling.

Nothing here imports other parts of the package. Arrays carry their shape in their name:
  B batch, L image tokens, C token channels, T text length, D width, H heads, K head dimension,
  N positions being read or sampled, M keys, R packed rows (positions of a group of examples),
  S noise draws per token, W width of the diffusion head.
"""
