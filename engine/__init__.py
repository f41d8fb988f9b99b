"""The inference engine: one decoder-only model on one device. Knows requests and models; the kernels are in `kernels`.

    llm                LLM: generate, stream, abort, in vLLM's shape
    sampling_params    SamplingParams: how a request is sampled, and when it ends
    prompts            what a prompt may be: text, token ids, a mapping; what is wrong with one
    outputs            RequestOutput, CompletionOutput, RequestMetrics: what comes back
    tokenizer          text to token ids and back, as it comes
    text               OutputText: the text of a growing output, cut at a stop string
    config             EngineConfig: the flags of `vllm serve`, with underscores
    errors, values     UserError: bad input, in one sentence; numbers and switches checked

    core               EngineCore: schedule, execute, update, one step ahead of itself
    scheduling         requests, block pool, prefix cache, scheduler; standard library only, shared with the simulator
    sequence           Sequence: a request of the scheduler with its tokens, its seed and the hashes of its blocks
    setup              from a configuration to a model that can run: load, measure, size the KV cache, capture graphs
    memory             MemoryReport: where the device's memory went, in vLLM's words

    runner             ModelRunner: a scheduled step in, sampled tokens out; CUDA graphs
    batch              StepBatch: the tensors that describe a step
    slots              Slots: what the device remembers of each running request
    sampling           LogitsProcessor: penalties, bias, min_tokens and log-probabilities, behind the graph
    transfer           Upload, PendingTokens: one asynchronous copy per step each way
    ops                Ops: norms, matrix products, activation, sampling, by kernels or in PyTorch

    models             config, hf: from config.json to a ModelConfig; loading, modules: weights; decoder, rope; builtin
    kv                 groups: which layers share pages; cache: the pages; attention over them, in Triton and PyTorch

    commands           memwall generate, memwall bench
    bench              the suites of memwall bench, and their records

`engine/README.md` tells how they work, how they are tested and what they do not do. Importing `engine`,
`engine.config`, `engine.errors` or `engine.scheduling` imports no torch.
"""
