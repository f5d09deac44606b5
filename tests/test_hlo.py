"""Reading compiled programs: matrix products, trip counts, device groups, and the timeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluid_jax.aot import hlo

# A hand-written schedule. Each trip of the loop gathers 4 MB while it computes for 1,000 of its
# 1,500 cycles.
PROGRAM = """
HloModule step, is_scheduled=true

%gather (p.1: bf16[1024,256]) -> bf16[1024,2048] {
  %p.1 = bf16[1024,256]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,2048]{1,0} all-gather(%p.1), replica_groups=[2,8]<=[16], dimensions={1}
}, execution_thread="sparsecore"

%product (a: bf16[64,1024], b: bf16[1024,2048]) -> bf16[64,2048] {
  %a = bf16[64,1024]{1,0} parameter(0)
  %b = bf16[1024,2048]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[64,2048]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%condition (state.1: (s32[], bf16[64,1024])) -> pred[] {
  %limit = s32[] constant(12)
  %state.1 = (s32[], bf16[64,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state.2: (s32[], bf16[64,1024])) -> (s32[], bf16[64,1024]) {
  %state.2 = (s32[], bf16[64,1024]{1,0}) parameter(0)
  %shard = bf16[1024,256]{1,0} fusion(%state.2), kind=kLoop, calls=%product, backend_config={"estimated_cycles":"500"}
  %start.1 = ((bf16[1024,256]{1,0}), bf16[1024,2048]{1,0}) call-start(%shard), to_apply=%gather
  %other = bf16[64,2048]{1,0} fusion(%shard), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1000"}
  %done.1 = bf16[1024,2048]{1,0} call-done(%start.1)
  ROOT %next = (s32[], bf16[64,1024]{1,0}) tuple(%state.2, %other)
}

ENTRY %main (x: bf16[64,1024]) -> bf16[64,1024] {
  %x = bf16[64,1024]{1,0} parameter(0)
  %loop = (s32[], bf16[64,1024]{1,0}) while(%x), condition=%condition, body=%body
  %sum = f32[1000]{0} all-reduce(%loop), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%condition
  ROOT %last = bf16[64,1024]{1,0} copy(%loop), backend_config={"estimated_cycles":"2000"}
}
"""  # noqa: E501


def test_a_timeline_multiplies_loops_and_hides_collectives_behind_compute():
  program = hlo.parse(PROGRAM)
  # 12 trips with two products of 2 x 64 x 1024 x 2048.
  assert hlo.flops(program) == 12 * 2 * (2 * 64 * 1024 * 2048)
  seen = []

  def seconds(kind, size, groups):
    seen.append((kind, size, groups.shape))
    return {'all-gather': 1.25e-6, 'all-reduce': 3e-6}[kind]

  line = hlo.timeline(program, 1e9, seconds)
  assert seen == [('all-gather', 1024 * 2048 * 2, (2, 8)), ('all-reduce', 4000, (2, 4))]
  assert line.compute_seconds == pytest.approx(12 * 1.5e-6 + 2e-6)
  gather, reduce = line.collectives['all-gather'], line.collectives['all-reduce']
  assert (gather.count, gather.asynchronous) == (12, 12)
  assert gather.bytes == 12 * 1024 * 2048 * 2
  assert gather.exposed_seconds == pytest.approx(
    12 * 0.25e-6
  )  # 1.25, of which 1.0 overlap with compute
  assert (reduce.count, reduce.asynchronous) == (1, 0)
  assert reduce.exposed_seconds == pytest.approx(3e-6)
  assert line.seconds == pytest.approx(12 * 1.75e-6 + 2e-6 + 3e-6)


# Without sparse cores: one fusion starts a gather, one continues it during a product, one ends it.
FUSED = """
%start (p.1: f32[4]) -> (f32[4], f32[32]) {
  %p.1 = f32[4]{0} parameter(0)
  %all-gather.1 = f32[32]{0} all-gather(%p.1), replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %custom.1 = (f32[4]{0}, f32[32]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (p.2: f32[32]) -> f32[32] {
  %p.2 = f32[32]{0} parameter(0)
  ROOT %all-gather.2 = f32[32]{0} all-gather(%p.2), replica_groups=[2,8]<=[16], dimensions={0}
}

%end (p.3: f32[32]) -> f32[32] {
  %p.3 = f32[32]{0} parameter(0)
  %all-gather.3 = f32[32]{0} all-gather(%p.3), replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %custom.3 = f32[32]{0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%scatter (p.4: f32[32]) -> f32[4] {
  %p.4 = f32[32]{0} parameter(0)
  %all-reduce.1 = f32[32]{0} all-reduce(%p.4), replica_groups=[2,8]<=[16], to_apply=%carry
  ROOT %slice.1 = f32[4]{0} slice(%all-reduce.1), slice={[0:4]}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %begun = (f32[4]{0}, f32[32]{0}) fusion(%x), kind=kCustom, calls=%start
  %piece = f32[32]{0} get-tuple-element(%begun), index=1
  %during = f32[32]{0} fusion(%piece), kind=kOutput, calls=%carry, backend_config={"estimated_cycles":"700"}
  %ended = f32[32]{0} fusion(%during), kind=kCustom, calls=%end
  ROOT %reduced = f32[4]{0} fusion(%ended), kind=kCustom, calls=%scatter
}
"""  # noqa: E501


def test_gathers_fused_with_products_are_hidden_by_them():
  line = hlo.timeline(hlo.parse(FUSED), 1e9, lambda kind, size, groups: 1e-6)
  assert line.compute_seconds == pytest.approx(0.7e-6)
  gather, scatter = line.collectives['all-gather'], line.collectives['reduce-scatter']
  assert (gather.count, gather.asynchronous, gather.bytes) == (1, 1, 128)
  assert gather.exposed_seconds == pytest.approx(0.3e-6)
  # A fusion around an all-reduce that keeps part of the sum is a reduce-scatter.
  assert (scatter.count, scatter.asynchronous, scatter.bytes) == (1, 0, 128)
  assert scatter.exposed_seconds == pytest.approx(1e-6)


# Two collectives over the links of a slice, the second of which waits for the first; at the same
# time a sum between slices, sent by the hosts; and a call that is not a collective.
SLICES = """
%gather (p.1: f32[4]) -> f32[32] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %all-gather.1 = f32[32]{0} all-gather(%p.1), replica_groups=[2,8]<=[16], dimensions={0}
}

%other (p.2: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p.2)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %token = token[] after-all()
  %send.1 = (f32[1,8,128]{2,1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2
  %start.1 = ((f32[4]{0}), f32[32]{0}) call-start(%x), to_apply=%gather
  %call.1 = ((f32[4]{0}), f32[4]{0}) call-start(%x), to_apply=%other
  %call.2 = f32[4]{0} call-done(%call.1)
  %full = f32[32]{0} reduce-scatter(%x), replica_groups=[2,8]<=[16], to_apply=%other
  %done.1 = f32[32]{0} call-done(%start.1)
  %recv.1 = (f32[1,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done.1 = (f32[1,8,128]{2,1,0}, token[]) recv-done(%recv.1), channel_id=1, control-predecessors={%send-done.1, %send.1}
  ROOT %last = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"2000"}
}
"""  # noqa: E501


def test_collectives_between_slices_have_their_own_network():
  seconds = {'all-gather': 2e-6, 'reduce-scatter': 1e-6, 'all-reduce between slices': 7e-6}
  seen = []

  def collective_seconds(kind, size, groups):
    seen.append((kind, size))
    return seconds[kind]

  line = hlo.timeline(hlo.parse(SLICES), 1e9, collective_seconds)
  assert seen == [
    ('all-reduce between slices', 4096), ('all-gather', 128), ('reduce-scatter', 8 * 128)
  ]  # fmt: skip
  # The links are busy for 3 microseconds; the wait for them counts for the gather.
  exposed = {kind: c.exposed_seconds for kind, c in line.collectives.items()}
  assert exposed == pytest.approx(
    {'all-gather': 2e-6, 'reduce-scatter': 1e-6, 'all-reduce between slices': 4e-6}
  )
  assert line.seconds == pytest.approx(7e-6 + 2e-6)
  between = line.collectives['all-reduce between slices']
  assert (between.count, between.asynchronous) == (1, 1)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('replica_groups={{0,2},{1,3}}, x=1', [[0, 2], [1, 3]]),
    ('replica_groups=[2,2]<=[4], x=1', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x=1', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
    (
      "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1",
      [[0, 1], [2, 3]],
    ),
    ('replica_groups={}, x=1', None),
  ],
)
def test_device_groups_are_read_in_all_notations(text, expected):
  found = hlo.device_groups(text)
  assert (found is None) if expected is None else (np.sort(found).tolist() == expected)


def test_products_and_loops_of_a_real_program_are_counted():
  """The program that XLA compiles for this CPU: a scan of 5 steps with one product each."""

  def run(x, w_Kx8x8):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_Kx8x8)[0]

  compiled = jax.jit(run).lower(jnp.ones((4, 8)), jnp.ones((5, 8, 8))).compile()
  assert hlo.flops(hlo.parse(compiled.as_text())) == 5 * 2 * 4 * 8 * 8


def test_padding_and_holes_of_convolutions_do_not_count():
  """TPU programs contain batched products as convolutions over a padded or dilated axis."""
  line = hlo.parse(
    """
ENTRY %main (a: f32[8,64,256], b: f32[8,64,128]) -> f32[8,256,128] {
  %a = f32[8,64,256]{2,1,0} parameter(0)
  %b = f32[8,64,128]{2,1,0} parameter(1)
  ROOT %c = f32[8,256,128]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0fb_0io->0bf
}
"""  # noqa: E501
  )
  # Eight images, each 256 x 128 dot products of 64: a window of 8, dilated by 8, has one input.
  assert hlo.flops(line) == 2 * 8 * 256 * 128 * 64
