"""What drafting gains: against the formulas of the literature, and the planner's own step times."""

from itertools import pairwise

import pytest

from dashboard.figures import speculation as figures
from dashboard.services import speculation, uploads
from dashboard.services.questions import Engine
from engine.scheduling import StepShape
from planner.catalog import load_gpu, load_model
from planner.errors import UserError
from planner.step_time import Evidence
from tests.dashboard.conftest import figure, sentences, settled
from tests.dashboard.test_figures import check

ENGINE = Engine(load_model("llama-3.1-8b"), load_gpu("h200_sxm"), max_model_len=4096)
RATES = (0.7,) * 4


def test_gains_are_tokens_over_time():
    found = speculation.gains(ENGINE, RATES, None, 1024)
    step_time = ENGINE.deployment().step_time()
    assert len(found) == 4 * len(speculation.BATCHES)
    for gain in found:
        # Leviathan et al. 2023: (1 - a^(k + 1)) / (1 - a) tokens per step.
        assert gain.tokens_per_step == pytest.approx((1 - 0.7 ** (gain.k + 1)) / (1 - 0.7))
        assert gain.plain_s == step_time.predict(StepShape(decode_contexts=[1024] * gain.batch))
        verify = StepShape(verifies=[(gain.k + 1, 1024)] * gain.batch)
        assert gain.step_s == pytest.approx(step_time.predict(verify))
        assert gain.evidence is Evidence.EXTRAPOLATED


def test_a_draft_model_costs_time_and_pays_less():
    free = speculation.gains(ENGINE, RATES, None, 1024)
    drafted = speculation.gains(ENGINE, RATES, load_model("llama-3.2-1b"), 1024)
    assert all(one.speedup < other.speedup for one, other in zip(drafted, free, strict=True))


def test_k_is_0_where_nothing_is_accepted():
    found = speculation.gains(ENGINE, (0.0, 0.0), None, 1024)
    assert {k for k, _ in speculation.best_by_batch(found).values()} == {0}


@pytest.mark.parametrize("lengths", speculation.MEASURED_LENGTHS.values())
def test_measured_lengths_are_reached_again(lengths):
    rates = speculation.rates_of_lengths(lengths)
    assert all(0 <= rate <= 1 for rate in rates)
    reached, length = 1.0, 1.0
    for k, (rate, measured) in enumerate(zip(rates, lengths, strict=True), start=1):
        reached *= rate
        length += reached
        # Noise in the measurement is smoothed, not followed.
        assert length == pytest.approx(measured, rel=0.06), k


def test_schedules_are_what_vllm_takes():
    best = {1: (4, 2.0), 2: (4, 1.9), 4: (2, 1.5), 8: (0, 1.0), 16: (0, 1.0)}
    rows = speculation.schedule(best)
    assert rows == [[1, 2, 4], [3, 4, 2], [5, 16, 0]]
    assert rows[0][0] == 1
    assert all(before[1] + 1 == after[0] for before, after in pairwise(rows))


def test_rates_as_people_write_them():
    assert speculation.parse_rates("0.8, 0.7,0.5", False) == (0.8, 0.7, 0.5)
    assert speculation.parse_rates("0.8, 0.4", True) == (0.8, 0.5)
    for text, unconditional in (("much", False), ("0.8, 0.9", True), ("1.2", False), ("", False), ("1," * 9, False)):
        with pytest.raises(UserError):
            speculation.parse_rates(text, unconditional)


def test_figures():
    found = speculation.gains(ENGINE, RATES, load_model("llama-3.2-1b"), 1024)
    chart = figures.speedup(found)
    check(chart)
    heat = chart.figure.data[0]
    at = {(gain.k, str(gain.batch)): gain.speedup for gain in found}
    assert all(heat.z[i][j] == at[k, batch] for i, k in enumerate(heat.y) for j, batch in enumerate(heat.x))
    check(figures.acceptance(RATES))
    assert figures.acceptance(RATES).figure.data[0].y == pytest.approx([0.7**k for k in range(1, 5)])
    chart = figures.best_k(found)
    check(chart)
    best = speculation.best_by_batch(found)
    assert list(chart.figure.data[0].y) == [k for k, _ in best.values()]


def test_no_gain_anywhere_can_be_drawn():
    check(figures.speedup(speculation.gains(ENGINE, (0.0, 0.0), None, 1024)))


LOG = (
    "INFO [metrics.py:96] SpecDecoding metrics: Mean acceptance length: 2.01, Accepted throughput: 1.0 tokens/s, "
    "Drafted throughput: 3.0 tokens/s, Accepted: 1015 tokens, Drafted: 3000 tokens, "
    "Per-position acceptance rate: 0.600, 0.300, 0.120, Avg Draft acceptance rate: 33.8%\n"
)


def test_recorded_rounds_are_read_by_the_planner(open_page):
    path = uploads.kept(uploads.add_log("server.log", LOG.encode()))
    rates, told = speculation.recorded(path)
    assert rates == pytest.approx((0.6, 0.5, 0.4))
    assert "1,015 of 3,000" in told
    app = open_page("speculation", acceptance="recorded: a server's log or /metrics")
    assert "Drop the log" in app.info[0].value
    app.file_uploader(key="acceptance_log_file").upload("server.log", LOG.encode(), "text/plain")
    settled(app)
    assert not app.error
    assert "60%, 30%, 12%" in sentences(app)
    drawn = figure(app, "acceptance")["data"][0]["y"]
    assert drawn == pytest.approx([0.6, 0.3, 0.12])
    app.file_uploader(key="acceptance_log_file").upload("other.log", b"max_num_seqs=256\n", "text/plain")
    settled(app)
    assert not app.exception
    assert "no acceptance per position" in app.error[0].value
