"""Every page as people meet it: useful before anything is chosen, changed by what is, and never a traceback."""

import json
import time

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import inputs
from dashboard.services import capacity, questions, results, work
from dashboard.services.questions import Engine, Traffic
from planner.catalog import list_gpus, list_models, load_gpu, load_model, model_entry
from planner.cost import cost_of
from planner.deployment import PriceList
from planner.memory import plan_memory
from planner.simulation import SimulationOptions, simulate
from tests.dashboard.conftest import APP, figure, sentences, settled, table


def _never(report, search, trace, cores):
    time.sleep(600)


PAGES = ("plan", "what_if", "memory", "speculation", "calibration", "catalog")


@pytest.mark.parametrize("page", PAGES)
def test_defaults_are_an_answer(page, open_page):
    app = open_page(page, rate="2")
    assert not app.exception
    assert not app.error
    assert app.title[0].value
    if page != "catalog":
        assert app.get("plotly_chart"), "an answer has a picture"


# ---- plan ----------------------------------------------------------------------------------------------------------


def test_plan_says_what_to_take(open_page):
    app = open_page("plan", rate="2")
    assert "Take 1 ×" in app.success[0].value
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["US$ per hour"] == "$4.50"
    assert "draws" in app.success[0].value
    plans = table(app, "GPUs", "replicas × TP")
    assert plans["GPUs"][0] == "1 × h200_sxm"
    pareto = figure(app, "pareto")
    assert sum(len(trace["x"]) for trace in pareto["data"] if trace["mode"] == "markers") == len(plans)
    assert "vllm serve" in app.code[0].value
    assert "meets" in sentences(app)


def test_plan_says_what_was_not_tried_and_compares_it_all_on_a_click(open_page):
    app = open_page("plan", rate="2", kv="fp8")
    assert "14 of the 15 GPU types with a price were not tried and may cost less" in sentences(app)
    assert "the GPU type that step times were measured on" in sentences(app)
    app.button(key="compare_all_gpus").click()
    settled(app)
    assert not app.exception
    assert len(app.multiselect(key="gpus").value) == 15
    assert len({each.split(" × ")[1] for each in table(app, "GPUs")["GPUs"]}) > 3
    assert not any(button.key == "compare_all_gpus" for button in app.button)
    # What the recommended plan rests on stands beside it, what others rest on below the table.
    rests = table(app, "GPUs", "step times")["step times"]
    assert rests[0] == "transferred"
    assert any("Step times are transferred from a profile of something else" in each.value for each in app.warning)
    assert "The cheapest plan whose step times were measured is plan" in sentences(app)


def test_warnings_of_other_plans_stand_below_the_table(open_page):
    app = open_page("plan", rate="2")
    assert [each.value for each in app.warning] == []
    told = [each.value for each in app.caption if "Plans" in each.value]
    assert any("fp8 KV on output quality" in each for each in told)
    assert any("step times are transferred" in each for each in told)
    only = open_page("plan", rate="2", kv="fp8")
    assert "fp8 KV on output quality" in only.warning[0].value


def test_the_columns_that_decide_come_first(open_page):
    columns = list(table(open_page("plan", rate="2"), "GPUs", "replicas × TP").columns)
    assert columns[:9] == ["plan", "GPUs", "KV", "US$/h", "TTFT p99, ms", "TPOT p99, ms", "P(SLO)", "SLO held in",
                           "step times"]  # fmt: skip


def test_a_first_look_says_that_it_is_one(open_page, monkeypatch):
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.query_params["rate"] = "2.2"  # which no other test has asked
    monkeypatch.setattr(work, "plan", _never)
    for _ in range(100):
        app.run()
        if app.info:
            break
    assert "First look, from the first 60 s of the load: 1 ×" in app.info[0].value
    assert not app.success
    assert {metric.label: metric.value for metric in app.metric}["US$ per hour"] == "≈ $4.50"
    assert not app.code, "nothing to launch yet"
    app.button(key="plan_cancel").click()
    app.run()
    assert "Cancelled." in sentences(app)
    assert "First look" in sentences(app)


def test_plan_says_where_the_length_limit_comes_from(open_page):
    app = open_page("plan", rate="2")
    assert "the load's longest request" in sentences(app)
    assert "the model takes up to 131072 tokens" in sentences(app)
    assert "e.g. an -Instruct" in app.code[0].value.replace("\n# ", " ")


def test_plan_says_what_would_be_surer(open_page, monkeypatch):
    monkeypatch.setattr(results, "is_sure", lambda plan: plan.rank > 1)
    app = open_page("plan", rate="2")
    assert "The cheapest on this load, but not a sure one: 1 ×" in app.info[0].value
    assert "To be sure, take plan" in app.success[0].value
    monkeypatch.setattr(results, "is_sure", lambda plan: False)
    assert "None of the plans that were drawn meets the SLO in every draw" in sentences(open_page("plan", rate="2"))


def test_plan_follows_its_inputs(open_page):
    app = open_page("plan", rate="2")
    app.multiselect(key="gpus").set_value(["h100_sxm"])
    settled(app)
    assert set(table(app, "GPUs", "replicas × TP")["GPUs"].str.split(" × ").str[1]) == {"h100_sxm"}
    app.multiselect(key="kv").set_value(["fp8"])
    settled(app)
    assert set(table(app, "GPUs", "replicas × TP")["KV"]) == {"fp8"}
    app.number_input(key="ttft").set_value(500.0)
    settled(app)
    assert "TTFT ≤ 500 ms" in sentences(app)


def test_an_slo_out_of_reach_is_told_in_a_sentence(open_page):
    app = open_page("plan", rate="2")
    app.number_input(key="tpot").set_value(0.5)
    settled(app)
    assert not app.exception
    assert len(app.error) == 1
    assert "tpot" in app.error[0].value.lower()


def test_nothing_to_search_is_told_in_a_sentence(open_page):
    app = open_page("plan", rate="2")
    app.multiselect(key="gpus").set_value([])
    settled(app)
    assert [error.value for error in app.error] == ["A plan needs at least one GPU type: choose one under Search"]


def test_a_plan_is_for_the_trace_that_was_dropped(open_page):
    rows = "".join(f"{0.5 * i},{200 + i},{20 + i % 7}\n" for i in range(120))
    app = open_page("plan", rate="2")
    app.number_input(key="rate").set_value(None)
    app.file_uploader[0].upload("mine.csv", ("arrival_s,input_tokens,output_tokens\n" + rows).encode(), "text/csv")
    settled(app)
    assert not app.error
    assert "trace mine.csv" in sentences(app)
    assert "120 requests" in sentences(app)
    assert "the kind of traffic only gives the SLO" in sentences(app)
    assert not {"isl", "osl"} & {field.key for field in app.number_input}
    assert app.query_params["trace"]
    # Whoever gets the link sees the same.
    other = open_page("plan", trace=app.query_params["trace"])
    assert "trace mine.csv" in sentences(other)


def test_a_bad_trace_is_one_sentence_and_the_page_goes_on(open_page):
    app = open_page("plan", rate="2")
    app.file_uploader[0].upload("bad.csv", b"colour,shape\nred,round\n", "text/csv")
    settled(app)
    assert not app.exception
    assert len(app.error) == 1
    assert "bad" in app.error[0].value
    assert "column" in app.error[0].value
    assert app.success, "the preset's plan is still there"


def test_a_link_to_a_trace_that_is_gone(open_page):
    app = open_page("plan", rate="2", trace="0123456789abcdef")
    assert not app.exception
    assert "drop the file again" in app.error[0].value


# ---- links ---------------------------------------------------------------------------------------------------------


def test_a_link_shows_the_same_screen(open_page):
    app = open_page("plan", rate="2", model="llama-3.2-3b", traffic="RAG", ttft="700", kv="fp8", gpus="h100_sxm")
    assert app.selectbox(key="model").value == "llama-3.2-3b"
    assert app.selectbox(key="traffic").value == "rag"
    assert app.number_input(key="ttft").value == 700
    assert app.multiselect(key="kv").value == ["fp8"]
    assert "llama-3.2-3b" in sentences(app)
    assert "TTFT ≤ 700 ms" in sentences(app)
    assert table(app, "GPUs", "replicas × TP")["GPUs"][0].endswith("h100_sxm")


def test_nonsense_in_a_link_falls_back_to_the_defaults(open_page):
    app = open_page("plan", rate="-5", model="gpt-9", kv="float1", ttft="soon", prices="h200_sxm:free,x:1")
    assert not app.exception
    assert not app.error
    assert app.selectbox(key="model").value == inputs.DEFAULT_MODEL
    assert app.number_input(key="rate").value is None


def test_prices_in_a_link_are_used(open_page):
    app = open_page("plan", rate="2", prices="h200_sxm:2")
    assert {metric.label: metric.value for metric in app.metric}["US$ per hour"] == "$2.00"


# ---- memory --------------------------------------------------------------------------------------------------------


def test_memory_is_the_planners(open_page):
    app = open_page("memory")
    engine = Engine(load_model("llama-3.1-8b"), load_gpu("h200_sxm"), max_model_len=32768)
    report = plan_memory(engine.model, engine.gpu, engine.deployment().memory_settings(), 5)
    assert float(app.metric[0].value) == pytest.approx(report.max_concurrency, rel=5e-3)
    assert app.success
    lines = capacity.concurrency_lines(engine, 131072)
    drawn = figure(app, "concurrency")["data"]
    assert drawn[0]["y"] == [value for _, value in lines[0].points]


def test_memory_moves_with_the_kv_format(open_page):
    app = open_page("memory")
    before = float(app.metric[0].value)
    app.selectbox(key="kv_dtype").set_value("fp8")
    settled(app)
    assert float(app.metric[0].value) == pytest.approx(2 * before, rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_memory_is_that_of_plans_and_simulations(dtype, open_page):
    app = open_page("memory", kv_dtype="bf16" if dtype == "bfloat16" else dtype)
    engine = Engine(load_model("llama-3.1-8b"), load_gpu("h200_sxm"), kv_cache_dtype=dtype, max_model_len=32768)
    assert float(app.metric[0].value) == pytest.approx(engine.deployment().memory().max_concurrency, rel=5e-3)
    assert "had room for when it was profiled" in sentences(app)
    assert "had room for when it was profiled" not in sentences(open_page("memory", utilization="0.8"))
    modelled = capacity.modelled_memory_of(engine, 100_000)
    assert capacity.memory_of(engine, 100_000).remedies == modelled.remedies


def test_the_context_is_no_longer_than_the_model_was_made_for(open_page):
    app = open_page("memory", model="qwen3-8b", context="64k")
    assert app.select_slider(key="context").options[-1] == "40k"
    assert app.select_slider(key="context").value == 32768
    app = open_page("memory", context="128k")
    assert app.select_slider(key="context").value == 131072
    app.selectbox(key="model").set_value("qwen3-8b")
    settled(app)
    assert not app.exception
    assert app.select_slider(key="context").value == 40960


def test_what_does_not_fit_says_why_and_what_would_help(open_page):
    app = open_page("memory", model="llama-3.1-70b")
    assert "does not fit" in app.error[0].value
    assert "weights" in app.error[0].value
    remedies = table(app, "change", "then it")
    assert "--tensor-parallel-size 2" in set(remedies["change"])
    assert not app.exception


def test_gpus_for_a_70b_of_128k_and_five_users(open_page):
    """S1, from the page."""
    app = open_page("memory", model="llama-3.1-70b", context="128k")
    held = table(app, "GPUs", "KV", "sequences")
    rows = {(row["GPUs"], row["KV"]) for _, row in held.iterrows()}
    assert ("2 × h200_sxm", "fp8") in rows
    assert ("2 × h200_sxm", "bf16") not in rows
    assert ("4 × h200_sxm", "bf16") in rows


@pytest.mark.parametrize("model", list_models())
def test_memory_of_every_model(model, open_page):
    page = open_page("memory", model=model)
    assert not page.exception
    assert all("defect" not in error.value for error in page.error)


@pytest.mark.parametrize("gpu", list_gpus())
def test_memory_of_every_gpu(gpu, open_page):
    page = open_page("memory", gpu=gpu)
    assert not page.exception
    assert all("defect" not in error.value for error in page.error)


# ---- what if -------------------------------------------------------------------------------------------------------


def test_what_if_compares_the_kv_formats_first(open_page):
    app = open_page("what_if", rate="2")
    assert len(app.success) == 2
    compared = table(app, "A: bf16 KV", "B: fp8 KV", "")
    assert list(compared.columns) == ["", "A: bf16 KV", "B: fp8 KV"]
    for key in ("ttft", "tpot", "e2el", "split", "ttft_rate", "tpot_rate", "over_time"):
        assert figure(app, key)["data"]
    assert "What binds first" in sentences(app)
    assert "Quality of fp8 KV" in sentences(app)
    assert "cliff" in sentences(app)


def test_what_if_says_what_a_million_tokens_cost(open_page):
    app = open_page("what_if", rate="2", prices="h200_sxm:2.5")
    costs = table(app, "A: bf16 KV", "B: fp8 KV", "").set_index("")["A: bf16 KV"]
    load = Traffic(request_rate=2.0, duration_s=questions.TRIAL_SECONDS).workload()
    deployment = Engine(load_model("llama-3.1-8b"), load_gpu("h200_sxm")).deployment(load)
    result = simulate(load, deployment.system(load), SimulationOptions())
    expected = cost_of(deployment, result, PriceList(overrides=(("h200_sxm", 2.5),)))
    assert costs["US$ per hour"] == "$2.50"
    told = float(costs["US$/1M output tokens"].removeprefix("$"))
    assert told == pytest.approx(expected.usd_per_million_output_tokens, rel=0.06)  # to the digits that draws allow
    told = float(costs["US$/1M tokens, in and out"].removeprefix("$"))
    assert told == pytest.approx(expected.usd_per_million_tokens, rel=0.06)


def test_what_if_8_gpus_four_ways(open_page):
    app = open_page("what_if", rate="2", compare="8 GPUs: TP 8, 4, 2 or 1")
    names = [f"{letter}: TP {size} × {8 // size}" for letter, size in zip("ABCD", (8, 4, 2, 1), strict=True)]
    rows = table(app, "", *names).set_index("")
    assert [rows[name]["GPUs"] for name in names] == ["8"] * 4


def test_what_if_tensor_parallel_or_replicas(open_page):
    app = open_page("what_if", rate="2", compare="Tensor parallel or replicas")
    assert table(app, "", "A: TP 2 × 1", "B: TP 1 × 2") is not None
    app.number_input(key="tp_b_replicas").set_value(3)
    settled(app)
    assert table(app, "", "B: TP 1 × 3") is not None


def test_what_if_of_three_and_of_what_does_not_fit(open_page):
    app = open_page("what_if", rate="2", kv_configurations="3", kv_c_gpu="a10g", model="llama-3.1-70b")
    assert not app.exception
    assert any("does not fit" in error.value for error in app.error)
    assert all("defect" not in error.value for error in app.error)


def test_what_if_the_tornado_is_computed_when_asked_for(open_page):
    app = open_page("what_if", rate="2", tornado="true")
    assert figure(app, "sensitivities")["data"]
    assert "Most matters" in sentences(app)


def test_a_question_can_be_cancelled_and_asked_again(monkeypatch):
    monkeypatch.setattr(questions, "LOAD_SECONDS", 600.0)
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.query_params["rate"] = "60"  # some seconds of work
    app.run()
    app.button(key="plan_quick_cancel").click()
    app.run()
    assert "Cancelled." in sentences(app)
    assert not app.success
    monkeypatch.setattr(questions, "LOAD_SECONDS", 20.0)
    app.number_input(key="rate").set_value(2.0)
    settled(app)
    assert app.success


# ---- shared inputs -------------------------------------------------------------------------------------------------


def test_inputs_survive_a_change_of_page(open_page):
    app = open_page("plan", rate="2", model="qwen3-8b")
    app.switch_page("views/memory.py")
    app.query_params["model"] = "qwen3-8b"  # as the browser keeps it
    settled(app)
    assert app.selectbox(key="model").value == "qwen3-8b"
    app.selectbox(key="kv_dtype").set_value("fp8")
    settled(app)
    app.switch_page("views/plan.py")
    settled(app)
    app.switch_page("views/memory.py")
    settled(app)
    assert app.selectbox(key="kv_dtype").value == "fp8"


# ---- speculation, calibration, catalog -----------------------------------------------------------------------------


def test_speculation_says_when_to_stop(open_page):
    app = open_page("speculation")
    assert "k =" in app.success[0].value
    assert "Extrapolated" in sentences(app)
    assert figure(app, "speedup")["data"][0]["type"] == "heatmap"
    app.selectbox(key="acceptance").set_value("your own rates")
    settled(app)
    app.text_input(key="rates").set_value("0.0, 0.0")
    settled(app)
    assert "0" in app.info[0].value
    app.text_input(key="rates").set_value("0.01, 0.01")
    app.selectbox(key="drafter").set_value("llama-3.2-3b")
    settled(app)
    assert "k should be 0" in sentences(app)
    app.text_input(key="rates").set_value("often")
    settled(app)
    assert "one per draft position" in app.error[0].value
    assert not app.exception


def test_calibration_shows_its_errors(open_page):
    app = open_page("calibration")
    rows = table(app, "table", "points")
    assert {"decode", "prefill", "mixed"} <= set(rows["table"])
    assert app.metric[0].value == "NVIDIA H200"
    app.selectbox(key="profile_kv").set_value("fp8")
    settled(app)
    assert figure(app, "parity")["data"]
    app.file_uploader(key="profile_file").upload("p.json", b"{}", "application/json")
    settled(app)
    assert "no profile" in app.error[0].value
    assert not app.exception


def test_a_model_that_is_added_travels_in_the_link(open_page):
    app = open_page("catalog")
    content = json.dumps(dict(model_entry("llama-3.2-1b")["config"]) | {"_name_or_path": "me/mine"}).encode()
    app.file_uploader(key="config_file").upload("config.json", content, "application/json")
    settled(app)
    assert not app.exception
    assert "part of the link" in app.success[0].value
    app.selectbox(key="model").set_value("mine")
    settled(app)
    app.switch_page("views/memory.py")
    settled(app)
    assert not app.exception
    assert app.selectbox(key="model").value == "mine"
    # Whoever opens the link has the model, quantised too if it says so.
    other = open_page("memory", own=app.query_params["own"], model="mine", weights="fp8")
    assert other.selectbox(key="model").value == "mine"
    engine = Engine(load_model("llama-3.2-1b", "fp8"), load_gpu("h200_sxm"), max_model_len=32768)
    expected = capacity.memory_of(engine, 5).max_concurrency
    assert float(other.metric[0].value) == pytest.approx(expected, rel=5e-3)


def test_a_gpu_that_is_added_travels_in_the_link(open_page):
    app = open_page("catalog")
    app.text_input(key="own_gpu_id").set_value("my gpu")
    app.number_input(key="own_gpu_usd").set_value(0.5)
    next(button for button in app.button if button.label == "Add").click()
    settled(app)
    assert not app.error
    app.switch_page("views/memory.py")
    settled(app)
    app.selectbox(key="gpu").set_value("my_gpu")
    settled(app)
    assert "my\\_gpu" in app.success[0].value
    other = open_page("memory", own=app.query_params["own"], gpu="my_gpu")
    assert other.success[0].value == app.success[0].value


@pytest.mark.parametrize("text", ["nonsense", "eJx", "", "A" * 50])
def test_a_damaged_link_is_one_sentence(text, open_page):
    app = open_page("memory", own=text)
    assert not app.exception
    assert [error.value for error in app.error if "damaged" in error.value] == [error.value for error in app.error]
    assert bool(app.error) == bool(text)
    assert app.success, "the page is there"


def test_prices_survive_a_change_of_page(open_page):
    app = open_page("catalog", prices="h200_sxm:2.5")
    assert table(app, "id", "your US$/h").set_index("id")["your US$/h"]["h200_sxm"] == 2.5
    app.switch_page("views/memory.py")
    settled(app)
    held = table(app, "GPUs", "KV", "US$/h")
    assert held.set_index("GPUs")["US$/h"].loc["1 × h200_sxm"].tolist()[0] == "$2.50"
    assert app.query_params["prices"] == "h200_sxm:2.5"
