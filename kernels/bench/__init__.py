"""`python -m kernels.bench`: every kernel beside its peers and against the limits of the machine, in one run.

    cases     what is measured: suites, shapes, the figures to reach
    works     our kernels' calls beside their peers', for any shape
    batches   … and the random caches that they read
    peers     what torch offers for the same work
    timing    how: CUDA graphs over rotating buffers, in interleaved rounds
    run       the suites, one after the other
    results   what came out: rows, figures and verdicts, the JSON record
    tables    … as text
    plots     … as figures

Only `results`, `tables` and `plots` are needed to show a record, and they run without torch.
"""
