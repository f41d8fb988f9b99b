"""A server and a real browser, for tests and for screenshots: `python -m tests.dashboard.browser FOLDER`.

That writes every page as it is seen first, and the whole of it, in both themes and on a phone; and the pictures of the
README, which lie in dashboard/images: FOLDER/readme-plan.png and FOLDER/readme-memory.png.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("", "what-if", "memory", "speculation", "calibration", "catalog")
SIZES = {"light": (1280, 800), "dark": (1280, 800), "phone": (390, 844)}
# Page, theme and height of the README's pictures.
README = {"plan": ("", "light", 1010), "memory": ("memory", "dark", 1130)}
# The frontend looks for its server below the page's own path first.
_PROBES = ("/_stcore/health", "/_stcore/host-config")


def chromium() -> str | None:
    """The browser that is installed, if one is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """A dashboard of this source tree; gives its address."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    code = f"from dashboard.commands import dashboard; dashboard(port={port}, host='127.0.0.1', headless=True)"
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _until_healthy(server, address)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def _until_healthy(server: subprocess.Popen, address: str) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=1) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("the dashboard does not start")


class Visitor:
    """One browser window, and what went wrong in it.

    Attributes:
        interactions: clicks on a page's name, choices, and fields written into, since a page was opened by its address.
        faults: what the page or the browser complained of.
    """

    def __init__(self, browser, address: str, mode: str = "light") -> None:
        width, height = SIZES[mode]
        scheme = "dark" if mode == "dark" else "light"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # other tests may have the cores
        self.address = address
        self.interactions = 0
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("response", self._note_response)
        self.page.on("console", self._note_message)
        self.page.on("requestfailed", self._note_failure)
        self.page.on("request", self._note_stranger)

    def _note_response(self, response) -> None:
        if response.status >= 400 and not response.url.endswith(_PROBES):
            self.faults.append(f"{response.status} {response.url}")

    def _note_message(self, message) -> None:
        # What could not be loaded is noted as a response, with its address.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(f"console: {message.text}")

    def _note_failure(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":
            self.faults.append(f"{request.failure} {request.url}")

    def _note_stranger(self, request) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.faults.append(f"asked another machine: {request.url}")

    def open(self, path: str) -> None:
        """Go to a page and wait until the script has run."""
        self.start(path)
        self.settle()

    def start(self, path: str = "") -> None:
        """Go to a page, and wait for no more than its title."""
        self.interactions = 0
        self.page.goto(f"{self.address}/{path}")
        self.page.wait_for_selector("h1", timeout=60_000)

    def visit(self, name: str, title: str) -> None:
        """Another page, by its name on the left."""
        self.interactions += 1
        self.page.get_by_role("link", name=name).click()
        self.page.get_by_role("heading", name=title, level=1).wait_for()
        self.settle()

    def back(self) -> None:
        """The browser's Back button; waits until the script has run for the entry that it finds."""
        self.interactions += 1
        # The script starts some time after the address has changed, and until then nothing seems to run. What it says
        # of the address would be put into the next entry if that were asked for before.
        self.page.evaluate("""() => new Promise((done, failed) => {
            setTimeout(() => failed('the script has not run'), 60000)
            const app = document.querySelector('[data-testid="stApp"]')
            const watch = new MutationObserver(() => {
                if (app.getAttribute('data-test-script-state') === 'running') { watch.disconnect(); done() }
            })
            watch.observe(app, {attributes: true})
            history.back()
        })""")
        self.settle()

    def drop(self, key: str, path: Path) -> None:
        """A file into the field with this key."""
        self.interactions += 1
        self.page.locator(f'.st-key-{key} input[type="file"]').set_input_files(path)

    def press(self, key: str, name: str, times: int) -> None:
        """A key of the keyboard, on the slider with this key."""
        self.interactions += 1
        slider = self.page.locator(f".st-key-{key} input").first
        slider.focus()
        for _ in range(times):
            slider.press(name)
        self.page.wait_for_timeout(500)
        self.settle()

    def settle(self, seconds: float = 300.0) -> None:
        """Wait until nothing runs and nothing is being computed."""
        deadline, quiet = time.monotonic() + seconds, 0
        while quiet < 3:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still at work after {seconds:g} s: {self.text()[:500]}")
            idle = self.page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').count() > 0
            busy = self.page.get_by_role("button", name="Cancel", exact=True).count() > 0
            quiet = quiet + 1 if idle and not busy else 0
            self.page.wait_for_timeout(250)

    def text(self) -> str:
        """The page without its sidebar."""
        return self.page.inner_text('[data-testid="stMain"]')

    def metric(self, label: str) -> str:
        """The value under a label."""
        box = self.page.locator('[data-testid="stMetric"]', has_text=label).first
        return box.locator('[data-testid="stMetricValue"]').inner_text()

    def choose(self, key: str, text: str) -> None:
        """An option of the select box with this key."""
        self.interactions += 1
        field = self.page.locator(f".st-key-{key} input").first
        field.click()
        field.fill(text)  # a long list shows its first entries only
        self.page.get_by_role("option", name=text, exact=True).first.click()
        self.page.wait_for_timeout(300)
        self.settle()

    def write(self, key: str, text: str) -> None:
        """Into the field with this key."""
        self.interactions += 1
        field = self.page.locator(f".st-key-{key} input").first
        field.fill(text)
        field.press("Enter")
        self.page.wait_for_timeout(300)
        self.settle()

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """What is in the window; or so many pixels of the page, 0 for all of it."""
        size = self.page.viewport_size
        if height is not None:
            main = '[data-testid="stMain"]'
            self.page.wait_for_timeout(2500)  # charts are drawn one after the other
            self.settle()
            height = height or self.page.evaluate(f"document.querySelector('{main}').scrollHeight")
            self.page.set_viewport_size({"width": size["width"], "height": height})
            self.page.wait_for_timeout(1500)
            self.settle()
        self.page.screenshot(path=path)
        self.page.set_viewport_size(size)

    def close(self) -> None:
        self.context.close()


def screenshots(folder: Path) -> None:
    """Every page in both themes and on a phone."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with served() as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        for mode in SIZES:
            visitor = Visitor(browser, address, mode)
            for page in PAGES:
                visitor.open(page)
                name = f"{page or 'plan'}-{mode}"
                visitor.screenshot(folder / f"{name}.png")
                visitor.screenshot(folder / f"{name}-whole.png", height=0)
            for name, (page, theme, height) in README.items():
                if theme == mode:
                    visitor.open(page)
                    visitor.screenshot(folder / f"readme-{name}.png", height)
            visitor.close()
        browser.close()


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]))
