"""What each KV precision costs in quality, measured by the engine itself on text that the target has not seen.

    variants         the formats, with and without residual window and skipped layers
    text             held-out windows to read, and prompts with a planted line to find again
    forcing          an engine that samples what it is told: every token a decode of its own
    newest_quantised what the low-bit formats would lose without their residual window (an emulation)
    scores           KL divergence, perplexity and agreement of every token, against the reference's logits
    intervals        bootstrap over documents, Wilson's interval of a share
    outliers         error of attention's output where a few channels are large
    study            all of it in order, and the record
    table            the record as text

`python -m calibration.kv_quality` is the command.
"""
