"""`memwall bench`: what the engine does on this device, or a server over HTTP, measured and written as records.

    decode, prefill, offline, serve, kv_cache    the suites: what is run, and what came out, as a table
    workload    requests to replay: our JSONL, synthetic ones, and prompts that share blocks where their ids are equal
    replay      requests arriving by the clock, whatever the engine does (open loop)
    http_serve  the suite `serve` over HTTP, on any OpenAI-compatible server
    http_client … and its connections, answers and events
    metrics     TTFT, TPOT, ITL and E2EL as `vllm bench serve` defines them
    step_log    shape and times of every step, one JSON object per line
    work        bytes and FLOPs that a step cannot avoid
    limits      copy bandwidth and matmul rate of the device
    session     engines one after the other, and the record they share
    record      … and its file
    options     the command line

Nothing here imports torch before an engine is built, so `--help` and `make-workload` run anywhere.
"""
