import jax
import pytest

from benchmarks.kernels import (
    ATTENTION,
    COPY,
    EMBEDDING,
    EXCHANGE,
    LOSS,
    NORM,
    OPTIMIZER,
    REST,
    Kernel,
    classify,
    from_chrome_trace,
    from_xspace,
    profile,
    sources_of,
)

# Names as the profilers give them, and what the kernels do.
NAMES = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN": "products, bfloat16",
    "nvjet_hsh_128x256_64x4_2x1_v_bz_TNN": "products, float16",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute": "products, bfloat16",
    "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16_stage4_warpsize2x2x1": "products, tf32",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_nn_align4>(Params)": "products, tf32",
    "ampere_sgemm_128x64_nn": "products, float32",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>()": "products, bfloat16",
    "void gemv2T_kernel_val<int, int, float, float, float, 128, 16>(cublasGemvParams)": "products, float32",
    "gemm_fusion_dot_general_12": "products, dtype not named",
    "triton_tem_fused_addmm_5": "products, dtype not named",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x64": ATTENTION,
    "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 3>": ATTENTION,
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>": ATTENTION,
    "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)": ATTENTION,
    "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor>": OPTIMIZER,
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>": OPTIMIZER,
    "triton_red_fused__log_softmax__log_softmax_backward_data_nll_loss_forward_3": LOSS,
    "void at::native::(anonymous namespace)::cunn_SoftMaxBackward<4, float>": LOSS,
    "triton_per_fused__to_copy_add_native_layer_norm_native_layer_norm_backward_17": NORM,
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>": NORM,
    "add_layer_norm_backward": NORM,
    "triton_poi_fused_embedding_dense_backward_2": EMBEDDING,
    "input_scatter_fusion_1": EMBEDDING,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIterator&)>": COPY,
    "Memcpy DtoD (Device -> Device)": COPY,
    "triton_poi_fused__to_copy_41": COPY,
    "loop_transpose_fusion_2": COPY,
    "wrapped_convert_13": COPY,
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096>)": EXCHANGE,
    "triton_poi_fused_gelu_mul_9": REST,
    "loop_multiply_tanh_fusion_4": REST,
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": REST,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_known_by_its_name(name):
    assert classify(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("input_reduce_fusion_8", "step: tree_norm / tree_sum / reduce_sum", OPTIMIZER),
        ("loop_add_subtract_fusion", "step: Program.train_step.step / sub", OPTIMIZER),
        ("input_concatenate_fusion_2", "step: tree_update_moment / add", OPTIMIZER),
        ("input_reduce_fusion", "backward: Block / add_norm / reduce_sum", NORM),
        ("input_reduce_fusion_1", "forward: _forward.add / _chunk_loss / _in_one_pass / reduce", LOSS),
        ("input_reduce_fusion_2", "backward: Linear / Linear._project / reduce_sum", REST),
        ("loop_transpose_fusion", "forward: CausalSelfAttention / causal_attention / transpose", COPY),
        ("triton_softmax_4", "forward: Block / add_norm / rsqrt", NORM),
        ("triton_softmax_5", "forward: _forward.add / _chunk_loss / _in_two_passes / exp", LOSS),
        ("nvjet_tst_64x8", "forward: _forward.add / _chunk_loss / dot_general", "products, bfloat16"),
    ],
)
def test_what_jax_compiled_is_known_by_its_source(name, source, kind):
    assert classify(name, source) == kind


def test_busy_time_counts_overlapping_kernels_once():
    kernels = [Kernel("nvjet_tst_a_1", 0, 4e6), Kernel("nvjet_tst_a_2", 2e6, 4e6), Kernel("nccl_x", 3e6, 1e6),
               Kernel("wrapped_convert_1", 10e6, 2e6)]  # fmt: skip
    found = profile(kernels, steps=2, step_seconds=5e-3)
    assert (found.step_ms, found.busy_ms, found.gaps_ms, found.launches) == (5.0, 4.0, 1.0, 2.0)
    assert list(found.kinds) == ["products, bfloat16", COPY, EXCHANGE]
    assert found.kinds["products, bfloat16"] == {"ms": 4.0, "launches": 1.0}
    assert found.kernels[0]["name"] == "nvjet_tst_a" and found.kernels[0]["launches"] == 1.0


HLO = """HloModule jit_step

ENTRY %main.1 (a.1: f32[4]) -> f32[4] {
  %a.1 = f32[4]{0} parameter(0)
  ROOT %loop_add_fusion.1 = f32[4]{0} fusion(%a.1), kind=kLoop, calls=%c, metadata={op_name="jit(step)/clip/mul"}
}
"""

SPACE = """planes { name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 2000000 duration_ps: 5000000 stats { metadata_id: 1 str_value: "fusion.7" } }
    events { metadata_id: 2 offset_ps: 9000000 duration_ps: 1000000 } }
  lines { name: "XLA Ops" events { metadata_id: 2 duration_ps: 7000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_1" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_1" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 7 } }
  event_metadata { key: 1 value { id: 1 name: "nothing" } } }
"""


def _space(text: str):
    data = jax.profiler.ProfileData
    return data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text))


def test_jaxs_trace_gives_each_launch_once_with_its_source():
    found = from_xspace(_space(SPACE), {"fusion_7": "forward: Linear / dot_general"} | sources_of(HLO))
    assert found == [
        Kernel("nvjet_tst_1", 3000.0, 5000.0, "forward: Linear / dot_general"),
        Kernel("loop_add_fusion_1", 10000.0, 1000.0, "step: clip / mul"),
    ]


def test_a_trace_without_a_gpu_says_what_it_has():
    with pytest.raises(LookupError, match="the trace has no GPU in it, only /host:CPU"):
        from_xspace(_space(SPACE.replace("/device:GPU:0", "/host:CPU")), {})


def test_torchs_trace_gives_what_ran_on_the_device():
    events = [
        {"ph": "X", "cat": "kernel", "name": "triton_poi_fused_gelu_1", "ts": 10.5, "dur": 2.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 20, "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 50},
        {"ph": "M", "name": "process_name"},
    ]
    assert from_chrome_trace({"traceEvents": events}) == [
        Kernel("triton_poi_fused_gelu_1", 10500.0, 2000.0),
        Kernel("Memcpy HtoD", 20000.0, 1000.0),
    ]
