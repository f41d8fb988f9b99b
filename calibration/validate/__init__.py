"""`memwall validate`: what the simulator predicts of a served workload, beside what the engine did.

    records      what a benchmark measured: times of every request, step log, the engine's settings
    external     runs of an engine that is not ours, as records
    profiles     the step times for a record, from a profile that fits it
    replay       the same arrivals and lengths through the simulator
    errors       the metrics of both sides and their errors; requests one by one; the limits to reach
    state        running requests and KV blocks, by the same arithmetic on both sides
    saturation   the request rate beyond which the queue grows
    steps        step times, step by step over a recorded log
    walk         a recorded sequence of steps on another clock
    decompose    where an error comes from: host, step times or schedule
    intervals    what a prediction may be off by, and how often measurements lie within
    study        all of it, record by record
    text, html   for people

Nothing here imports torch.
"""
