"""Several people at once, each in a browser window: `python -m tests.dashboard.users --output record.json`.

Everybody opens the memory page and changes the KV format again and again; meanwhile some have a plan searched. A
response is the time from the change to the new number on the screen, the browser's own work on the same machine
included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

from tests.dashboard.browser import chromium, served

_DTYPES = ("bf16", "fp8", "int8", "int4", "int2")
_MODELS = ("llama-3.1-8b", "qwen3-8b", "llama-3.2-3b", "gemma-3-12b", "mistral-7b-v0.1")


async def person(
    browser, address: str, number: int, changes: int, pause_s: float, faults: list[str], all_there: asyncio.Barrier
) -> list[float]:
    """One person's responses, in seconds, from when everybody's page has been loaded."""
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    page = await context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    rng = random.Random(number)
    await page.goto(f"{address}/memory?model={_MODELS[number % len(_MODELS)]}")
    value = page.locator('[data-testid="stMetricValue"]').first
    await value.wait_for(timeout=120_000)
    await all_there.wait()
    responses = []
    now = "bf16"
    for _ in range(changes):
        await asyncio.sleep(rng.uniform(0.5, 1.5) * pause_s)
        wanted = rng.choice([dtype for dtype in _DTYPES if dtype != now])
        await page.locator(".st-key-kv_dtype input").first.click()
        option = page.get_by_role("option", name=wanted, exact=True).first
        started = time.perf_counter()
        await option.click()
        await page.get_by_text(f"{wanted} KV: the KV pool holds").first.wait_for(timeout=60_000)
        responses.append(time.perf_counter() - started)
        now = wanted
    if await page.locator('[data-testid="stException"]').count():
        faults.append("an exception is shown")
    await context.close()
    return responses


async def planner(browser, address: str, rate: float, faults: list[str], all_there: asyncio.Barrier) -> float:
    """Seconds to the first look at a plan, its page's loading included."""
    await all_there.wait()
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    page = await context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    started = time.perf_counter()
    await page.goto(f"{address}/?rate={rate}")
    await page.get_by_text("First look, from").first.wait_for(timeout=300_000)
    seconds = time.perf_counter() - started
    await context.close()
    return seconds


async def measure(address: str, users: int, planners: int, changes: int, pause_s: float) -> dict:
    from playwright.async_api import async_playwright

    faults: list[str] = []
    async with async_playwright() as play:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = await play.chromium.launch(executable_path=chromium(), args=arguments)
        all_there = asyncio.Barrier(users)  # ten browsers that start on one machine have nothing to do with the server
        people = [
            person(browser, address, number, changes, pause_s, faults, all_there) for number in range(users - planners)
        ]
        searches = [planner(browser, address, 1 + number / 10, faults, all_there) for number in range(planners)]
        found = await asyncio.gather(*people, *searches)
        await browser.close()
    responses = sorted(seconds for each in found[: users - planners] for seconds in each)
    return {
        "users": users,
        "of_them_planning": planners,
        "changes": len(responses),
        "response_median_s": round(statistics.median(responses), 3),
        "response_p95_s": round(responses[max(0, -(-95 * len(responses) // 100) - 1)], 3),
        "first_look_at_a_plan_s": [round(seconds, 2) for seconds in found[users - planners :]],
        "faults": faults,
        "responses_s": [round(seconds, 3) for seconds in responses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--planners", type=int, default=2)
    parser.add_argument("--changes", type=int, default=8)
    parser.add_argument("--pause-s", type=float, default=4.0, help="mean time that a person looks at an answer")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with served() as address:
        found = asyncio.run(measure(address, given.users, given.planners, given.changes, given.pause_s))
    record = {
        "command": "python -m tests.dashboard.users",
        "pause_s": given.pause_s,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **found,
    }
    print(json.dumps({name: value for name, value in record.items() if name != "responses_s"}, indent=2))
    if given.output:
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
