"""Measuring an engine for a profile: which steps, how they are run, and how a run that was ended goes on.

grid        Point, Room: the steps to measure, as data, and which of them an engine can run
pool        the KV cache filled with numbers of the model, and its free pages in random order
steps       StepRunner: steps of a wished shape through the engine's own loop, one or two in flight
clock       Clock: how much longer prompts take that follow prompts, and how soon
allreduce   all-reduce by bytes, where there are two GPUs or more
part        PartFile: what has been measured so far, one line each, so that a run can be continued
study       all of it, within a budget of time, into a profile
facts       what a profile says of model, GPU and engine
fit         the errors of the planner's fit, where it is installed
table       a profile in a few lines
"""
