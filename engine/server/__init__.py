"""`memwall serve`: the engine behind OpenAI's HTTP interface.

    run, settings         a server from its start to its end, and what it is told
    app, guard            the endpoints, and what every request passes before it reaches one
    protocol, chat        what is asked: OpenAI's requests, and chats as prompts
    answers, logprobs     what is answered, in one piece or as a stream
    sse, errors           how streams and errors look on the wire
    metrics               Metrics: vLLM's Prometheus names

    async_engine          AsyncEngine: requests in, streams of tokens out, on one asyncio loop
    worker                the process that steps the engine: commands in, one message per step out
    messages              what the two tell each other, and the channel between them

The last three import neither torch nor a library of the server; the worker imports torch when it loads the model.
"""
