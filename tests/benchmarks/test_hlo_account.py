import pytest

from benchmarks.hlo import parse
from benchmarks.hlo_account import Account, account
from benchmarks.hlo_cost import COPY
from gpt2_core.errors import UserError
from gpt2_jax.planning import gpus

# Rates at which FLOPs, bytes and exchanged bytes are easily told apart.
GPU = gpus.Gpu("test", (9, 0), product_flops=1e6, float32_flops=1e4, bandwidth=1e9, link_bandwidth=1e6, memory=10**9)
CUBLAS = 'custom_call_target="__cublas$lt$matmul"'
DIMENSIONS = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'


def gemm(*, epilogue: str = "DEFAULT", beta: int = 0, precision: str = "DEFAULT") -> str:
    how = (
        f'{DIMENSIONS},"precision_config":{{"operand_precision":["{precision}"]}},"epilogue":"{epilogue}","beta":{beta}'
    )
    return f'{CUBLAS}, backend_config={{"gemm_backend_config":{{{how}}}}}'


def read(*instructions: str, before: str = "", head: str = "num_partitions=4") -> Account:
    """The account of a program with these instructions in its entry; `before` are other computations."""
    body = "\n".join(f"  {line}" for line in instructions)
    return account(
        f"HloModule m, is_scheduled=true, {head}\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n", GPU
    )


A = "%a = bf16[64,32]{1,0} parameter(0)"
B = "%b = bf16[32,16]{1,0} parameter(1)"
WIDE = "%w = f32[64,32]{1,0} parameter(2)"
WIDE_B = "%v = f32[32,16]{1,0} parameter(3)"
FLOPS = 2 * 64 * 32 * 16


def test_a_product_counts_two_operations_for_each_multiplied_pair_and_no_workspace():
    found = read(
        A,
        B,
        f"%c = (bf16[64,16]{{1,0}}, s8[4096]{{0}}) custom-call(%a, %b), {gemm(epilogue='BIAS')}",
        f"%d = (bf16[64,16]{{1,0}}, s8[4096]{{0}}) custom-call(%a, %b), {gemm(beta=1)}",
        f"%e = (bf16[64,16]{{1,0}}, s8[4096]{{0}}) custom-call(%a, %b), {gemm(epilogue='BIAS')}",
    )
    first, second = found.products
    shapes = "bf16[64,32] x bf16[32,16] -> bf16[64,16]"
    assert (first.shapes, first.launches, first.flops) == (f"{shapes} BIAS", 2, 2 * FLOPS)
    assert (second.shapes, second.launches) == (f"{shapes} +=", 1)
    assert first.ms == pytest.approx(1e3 * 2 * FLOPS / GPU.product_flops) == found.floor_ms * first.share
    assert not first.float32
    (traffic,) = found.bytes_by_kind.values()
    assert traffic.bytes == 3 * 2 * (64 * 32 + 32 * 16 + 64 * 16)


@pytest.mark.parametrize(("precision", "rate"), [("DEFAULT", GPU.tf32_flops), ("HIGHEST", GPU.float32_flops)])
def test_a_product_with_a_float32_operand_is_marked_and_slower(precision, rate):
    product = f"(f32[64,16]{{1,0}}, s8[4096]{{0}}) custom-call(%w, %v), {gemm(precision=precision)}"
    (found,) = read(WIDE, WIDE_B, f"%c = {product}").products
    assert found.float32 and found.ms == pytest.approx(1e3 * FLOPS / rate)


def test_a_product_inside_a_fusion_is_a_product():
    dot = "dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    fused = f"""%f (x: bf16[64,32], y: bf16[32,16]) -> bf16[64,16] {{
  %x = bf16[64,32]{{1,0}} parameter(0)
  %y = bf16[32,16]{{1,0}} parameter(1)
  ROOT %z = bf16[64,16]{{1,0}} {dot}
}}
"""
    found = read(A, B, "ROOT %c = bf16[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%f", before=fused)
    assert [product.flops for product in found.products] == [FLOPS]
    assert found.parts_ms["products"] == found.floor_ms > 0


FUSED = """%slices (p0: f32[100,8], p1: f32[8], p2: s32[]) -> f32[8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %flat = f32[800]{0} bitcast(%p0)
  %part = f32[8]{0} dynamic-slice(%flat, %p2), dynamic_slice_sizes={8}
  ROOT %sum = f32[8]{0} add(%part, %p1)
}

%updates (p0: f32[100,8], p1: f32[1,8], p2: s32[]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %twice = f32[1,8]{1,0} add(%p1, %p1)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p0, %twice, %p2, %p2)
}

%moves (p0: f32[100,8]) -> f32[8,100] {
  %p0 = f32[100,8]{1,0} parameter(0)
  ROOT %t = f32[8,100]{1,0} transpose(%p0), dimensions={1,0}
}

%narrows (p0: f32[100,8]) -> bf16[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  ROOT %c = bf16[100,8]{1,0} convert(%p0)
}
"""
TABLE = ("%t = f32[100,8]{1,0} parameter(0)", "%u = f32[8]{0} parameter(1)", "%n = s32[] parameter(2)")


@pytest.mark.parametrize(
    ("instruction", "kind", "size"),
    [
        # A slice of 8, the other operand of 8, an index, and the result of 8: not the table of 800.
        ("%r = f32[8]{0} fusion(%t, %u, %n), kind=kLoop, calls=%slices", "fusion, loop", 4 * (8 + 8 + 1 + 8)),
        # Reads the new row and an index, writes the row into the table.
        ("%r = f32[100,8]{1,0} fusion(%t, %u, %n), kind=kLoop, calls=%updates", "fusion, loop", 4 * (8 + 1 + 8)),
        ("%r = f32[8,100]{1,0} fusion(%t), kind=kInput, calls=%moves", COPY, 4 * 2 * 800),
        ("%r = bf16[100,8]{1,0} fusion(%t), kind=kLoop, calls=%narrows", "conversion of dtype", (4 + 2) * 800),
        ("%r = f32[8,100]{1,0} copy(%t)", COPY, 4 * 2 * 800),
        # An operand that is given twice is read once.
        ("%r = f32[100,8]{1,0} add(%t, %t)", "add", 4 * 2 * 800),
    ],
)
def test_a_kernel_reads_and_writes_what_it_touches(instruction, kind, size):
    found = read(*TABLE, instruction, before=FUSED)
    assert {name: traffic.bytes for name, traffic in found.bytes_by_kind.items()} == {kind: size}
    assert found.kernels == 1 and found.floor_ms == pytest.approx(1e3 * size / GPU.bandwidth)


def loop(trips: str, body: str) -> str:
    """A loop over a float32 array of 1000 with this body, and the entry's call of it."""
    return f"""%body (s: (f32[1000])) -> (f32[1000]) {{
  %s = (f32[1000]{{0}}) parameter(0)
  %x = f32[1000]{{0}} get-tuple-element(%s), index=0
{body}
  ROOT %out = (f32[1000]{{0}}) tuple(%x)
}}

%condition (s: (f32[1000])) -> pred[] {{
  %s = (f32[1000]{{0}}) parameter(0)
  ROOT %go = pred[] constant(true)
}}
""", f'%l = (f32[1000]{{0}}) while(%init), condition=%condition, body=%body, backend_config={{{trips}}}'  # fmt: skip


INIT = ("%x0 = f32[1000]{0} parameter(0)", "%init = (f32[1000]{0}) tuple(%x0)")


@pytest.mark.parametrize(("trips", "count"), [('"known_trip_count":{"n":"5"}', 5), ("", None)])
def test_a_loop_counts_as_often_as_it_runs(trips, count):
    before, call = loop(trips, "  %y = f32[1000]{0} negate(%x)\n  %r = f32[1000]{0} all-reduce(%y), replica_groups={}")
    found = read(*INIT, call, before=before)
    assert found.kernels == (count or 1)
    assert found.bytes_by_kind["negate"].bytes == 8000 * (count or 1)
    assert [loop.trips for loop in found.loops] == [count]
    (collective,) = found.collectives
    assert collective.times == (count or 1) and len(collective.loops) == 1
    assert found.exposed_ms == pytest.approx((count or 1) * 1e3 * 4000 * 2 * 3 / 4 / GPU.link_bandwidth)


def test_all_runs_of_a_loop_are_beside_an_exchange():
    before, call = loop('"known_trip_count":{"n":"5"}', "  %y = f32[1000]{0} negate(%x)")
    start, done = "all-reduce-start(%x0), replica_groups={}", "all-reduce-done(%s)"
    found = read(*INIT, f"%s = f32[1000]{{0}} {start}", call, f"%d = f32[1000]{{0}} {done}", before=before)
    (collective,) = found.collectives
    assert collective.kernels_beside == 5
    assert collective.exposed_ms == pytest.approx(collective.ms - found.floor_ms) and found.floor_ms > 0


def test_an_exchange_is_exposed_where_no_kernel_runs_beside_it():
    """Two seconds of products beside an all-reduce of six: four are waited for. The one after it queues behind it."""
    start = "all-reduce-start(%big), replica_groups=[1,4]<=[4], to_apply=%add"
    found = read(
        "%big = f32[1000000]{0} parameter(0)",
        "%x = bf16[1000,1000]{1,0} parameter(1)",
        "%y = bf16[1000,1]{1,0} parameter(2)",
        f"%s = f32[1000000]{{0}} {start}",
        f"%p = (bf16[1000,1]{{1,0}}, s8[64]{{0}}) custom-call(%x, %y), {gemm()}",
        "%d = f32[1000000]{0} all-reduce-done(%s)",
        f"%q = (bf16[1000,1]{{1,0}}, s8[64]{{0}}) custom-call(%x, %y), {gemm()}",
        "%r = f32[1000000]{0} all-reduce(%big), replica_groups=[1,4]<=[4], to_apply=%add",
    )
    first, second = found.collectives
    assert (first.kernels_beside, first.flops_beside, first.devices) == (1, 2e6, 4)
    assert first.ms == pytest.approx(6000) and first.exposed_ms == pytest.approx(4000)
    assert second.exposed_ms == pytest.approx(6000) and second.kernels_beside == 0
    assert found.exchange_ms == pytest.approx(12_000) and found.exposed_ms == pytest.approx(10_000)
    assert found.floor_ms == pytest.approx(4000)


def test_two_exchanges_at_once_share_the_interconnect():
    start = "all-reduce-start(%big), replica_groups=[1,4]<=[4], to_apply=%add"
    found = read(
        "%big = f32[1000000]{0} parameter(0)",
        f"%s = f32[1000000]{{0}} {start}",
        f"%t = f32[1000000]{{0}} {start}",
        "%d = f32[1000000]{0} all-reduce-done(%s)",
        "%e = f32[1000000]{0} all-reduce-done(%t)",
    )
    assert found.exposed_ms == pytest.approx(12_000)


@pytest.mark.parametrize(
    ("operation", "groups", "whole", "share"),
    [
        ("all-reduce", "{{0,1},{2,3}}", 4000, 2 * 1 / 2),
        ("all-gather", "[2,2]<=[4]", 8000, 1 / 2),
        ("reduce-scatter", "{}", 4000, 3 / 4),
        ("all-to-all", "mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", 4000, 1 / 2),
        ("all-gather", "mesh['axis_0'=4] {'axis_0':(1)2}", 8000, 1 / 2),
        ("all-gather", "mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", 8000, 1 / 2),
        ("all-gather", "mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", 16000, 3 / 4),
    ],
)
def test_a_ring_sends_its_share_of_the_whole_arrays(operation, groups, whole, share):
    (found,) = read(
        INIT[0], f"%r = f32[1000]{{0}} {operation}(%x0), replica_groups={groups}, dimensions={{0}}"
    ).collectives
    assert (found.kind, found.bytes_by_dtype) == (operation, {"f32": whole})
    assert found.ms == pytest.approx(1e3 * whole * share / GPU.link_bandwidth)


@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
@pytest.mark.parametrize(("mask", "part"), [("CAUSAL", 1 / 2), ("NO_MASK", 1)])
def test_attention_counts_the_scores_that_its_mask_leaves(target, products, mask, part):
    shape = '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "10", "20"]}'
    found = read(
        "%q = bf16[2,10,3,8]{3,2,1,0} parameter(0)",
        f'%o = (bf16[2,3,10,8]{{3,2,1,0}}) custom-call(%q), custom_call_target="{target}", '
        f'backend_config={{{shape}, "mask_type": "{mask}"}}',
    )
    flops = part * products * 2 * (2 * 3 * 10 * 20) * 8
    assert found.parts_ms["attention"] == pytest.approx(1e3 * flops / GPU.attention_flops) == found.floor_ms


TABLES = """FunctionNames
1 "step"
2 "Block.__call__"
3 "MLP.__call__.<locals>.<genexpr>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=2 end_line=2 column=1 end_column=2}
3 {file_name_id=1 function_name_id=3 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

"""


def test_kernels_of_all_layers_are_one_group_and_directions_are_told_apart():
    def negate(name: str, op_name: str, frame: int = 3) -> str:
        return f'%{name} = f32[1000]{{0}} negate(%x0), metadata={{op_name="{op_name}" stack_frame_id={frame}}}'

    found = read(
        INIT[0],
        negate("a", "jit(step)/jvp(h.0)/neg"),
        negate("b", "jit(step)/jvp(h.11)/neg"),
        negate("c", "jit(step)/transpose(jvp(h.0))/neg"),
        negate("d", "jit(step)/transpose(jvp(checkpoint))/rematted_computation/neg"),
        negate("e", "jit(step)/while/body/neg", frame=1),
        "%wrapped_negate.17 = f32[1000]{0} negate(%x0)",
        before=TABLES,
    )
    assert {group.source: group.launches for group in found.groups} == {
        "forward: Block / MLP / h.* / neg": 2,
        "backward: Block / MLP / h.* / neg": 1,
        "recomputed: Block / MLP / neg": 1,
        "step: step / neg": 1,
        "made by the compiler: wrapped_negate": 1,
    }


def test_what_cannot_be_accounted_for_is_refused():
    with pytest.raises(UserError, match="no ENTRY computation"):
        parse("hello")
    with pytest.raises(UserError, match="has a conditional"):
        read(INIT[0], "%c = f32[1000]{0} conditional(%x0), branch_computations={%a, %b}")


def test_rates_come_from_the_description_of_the_chip():
    h200, a100 = gpus.load("h200"), gpus.load("a100")
    assert (h200.capability, a100.capability) == ((9, 0), (8, 0))
    # Of the datasheets: 67 and 19.5 TFLOP/s in float32, 4.8 and 2.0 TB/s.
    assert h200.float32_flops == pytest.approx(67e12, rel=0.01) and a100.float32_flops == pytest.approx(
        19.5e12, rel=0.01
    )
    assert h200.bandwidth == 4.8e12 and a100.bandwidth == pytest.approx(2.04e12, rel=0.01)
    with pytest.raises(UserError, match="--target b200: no such GPU; use h200, h100, a100"):
        gpus.load("b200")
