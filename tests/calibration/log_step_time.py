"""Step times fitted to a step log: enough to see what a simulator makes of an engine's own step times."""

from bisect import bisect_left

import numpy as np
from scipy.optimize import nnls

from planner.step_time import Evidence, StepTime

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8))


class LogStepTime(StepTime):
    """Decodes: a constant for each graph size, one per request and one per cached token. Steps with prompts: a
    constant for each bucket of tokens (padded), one per token, one per cached token and per square of a prompt.
    """

    evidence = Evidence.MEASURED
    description = "measured step times, fitted to a step log"

    def __init__(self, steps, host_s=(0.0001, 1e-6, 0.0002), bucket=128):
        self.host_s, self.bucket = host_s, bucket
        decodes = [s for s in steps if s.graph_size and not s.shape.prefills]
        mixed = [s for s in steps if s.shape.prefills]
        self.sizes = sorted({s.graph_size for s in decodes})
        rows = np.zeros((len(decodes), len(self.sizes) + 2))
        for i, s in enumerate(decodes):
            rows[i, self.sizes.index(s.graph_size)] = 1
            rows[i, -2:] = len(s.shape.decode_contexts), sum(s.shape.decode_contexts)
        self.decode = self._solve(rows, [s.gpu_s for s in decodes])
        rows = np.array([self._mixed(s.shape) for s in mixed])
        self.mixed = self._solve(rows, [s.gpu_s for s in mixed])

    @staticmethod
    def _solve(rows, seconds):
        seconds = np.array(seconds)
        weights = 1 / seconds
        for _ in range(10):  # towards least absolute relative errors
            scale = np.abs(rows * weights[:, None]).max(0)
            scale[scale == 0] = 1
            found = nnls(rows * weights[:, None] / scale, seconds * weights)[0] / scale
            residual = np.abs(rows @ found - seconds) / seconds
            weights = 1 / seconds / np.sqrt(np.maximum(residual, 1e-3))
        return found

    def _mixed(self, shape):
        tokens = shape.num_tokens
        knots = np.maximum(0, tokens - np.arange(128, 2049, self.bucket))
        attention = sum(q * (q / 2 + c) for q, c in shape.prefills)
        contexts = sum(shape.decode_contexts)
        return [1, tokens, *knots, attention, len(shape.prefills), len(shape.decode_contexts), contexts]

    def predict(self, step):
        if step.prefills:
            return float(np.dot(self._mixed(step), self.mixed))
        batch = len(step.decode_contexts)
        place = min(bisect_left(self.sizes, batch), len(self.sizes) - 1)
        return float(self.decode[place] + self.decode[-2] * batch + self.decode[-1] * sum(step.decode_contexts))

    def host_ticks(self, step):
        base, request, prefill = self.host_s
        return round((base + request * step.num_requests + prefill * len(step.prefills)) * 1e15)
