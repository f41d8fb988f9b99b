"""Trains a target and a draft model that speculation, quality measurements and CPU tests run on.

    corpus      text of the Python packages that are installed here, and what of it is held out
    tokenizer   byte-pair tokens, shared by both models
    llama       the models, with the tensor names of Hugging Face
    loop        batches, learning rate, steps until the time is up
    evaluation  loss of each and agreement of the two on held-out text
    pair        all of it in order, and the folder that it leaves

`python -m calibration.train_pair` is the command.
"""
