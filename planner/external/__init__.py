"""Calibrate from somebody else's engine without touching it: its benchmark's timestamps and its log.

read_served_runs(path)      what a benchmark client or the engine's own request log recorded
read_server_log(text)       what the server printed: KV blocks, limits, acceptance, counters
calibrate_external(...)     the few factors on a base step time that such a black box reveals
parity(runs, system)        the same requests served and simulated: each metric's error, each request
load_external(path)         a saved calibration, with `step_time(base)`
"""
