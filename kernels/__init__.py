"""GPU kernels for LLM inference, and their PyTorch references. Knows tensors; knows no model and no request.

    pages         PageLayout: the bytes of a KV page in seven formats, and the residual window of the low-bit ones
    cache         slot_mapping, write_kv: RoPE, quantisation and the store in one launch; dequantise_pages
    prefill       prefill_attention: many new tokens per sequence, over themselves and a paged context
                    prefill_hopper: the same for Hopper GPUs, in Gluon; prefill_grid: what both share
    decode        decode_attention: 1 to 16 new tokens per sequence, over pages of any format
                    decode_plan: plan_decode, its split over the GPU; planes: packed numbers on tensor cores
    elementwise   rms_norm, qk_norm_rope, silu_mul
    quantise      quantise_tokens_fp8, rms_norm_fp8, silu_mul_fp8: activations with a scale per token, for W8A8
    skinny        skinny_linear, skinny_gate_up: matrix products of 1 to 16 rows, as fast as the weight can be read
    sampling      sample, verify, processed_probs, token_logprobs
    reference     what they all mean, in plain PyTorch: pages, attention, elementwise, quantise, linear, sampling

    checks        arguments looked at on the host, where `check` is set
    interpreting  whether kernels run under Triton's interpreter, on a CPU
    aot           compiles a kernel for a Hopper GPU without one, for tests
    bench         python -m kernels.bench: every kernel beside its peers

Shapes are the same everywhere. The new tokens of all sequences lie in one flat batch [num_tokens, heads, head_dim], cut
by query_start [num_seqs + 1]; block_tables [num_seqs, max_pages] names each sequence's pages; seq_lens counts the new
tokens too. These are tensors on the GPU, which no launcher reads unless `check` is set, so that a step can be captured
in a CUDA graph.

`kernels/README.md` tells how they work, how they are tested and what they do not do.
"""
