"""A headless Chromium of this machine, driven by Playwright, for tests of pages."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60.0


class Browser:
    """One tab. complaints: errors of the console and of scripts. requests: addresses that the tab asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(1000 * SECONDS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("warning", "error", "assert"):
            self.complaints.append(f"{message.text} {message.location['url']}")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        return self.page.evaluate(script)

    def until(self, script: str) -> Any:
        """Waits until the expression is true, and returns its value."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not within {SECONDS:g} s: {script}; the page has: {self.text('body')}"
            self.page.wait_for_timeout(50)
        return value

    def open(self, address: str) -> None:
        """Opens a page in a wide window, and forgets complaints and requests of the one before."""
        # The page before may still ask for something, and does not load again where only the fragment differs.
        self.page.goto("about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.resize(1280, 1000)
        self.page.goto(address)

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        return self.page.locator(selector).first.inner_text()

    def choose_files(self, selector: str, files: Sequence[Path]) -> None:
        """Chooses files in a file field, as a person does in its dialog."""
        self.page.set_input_files(selector, files)

    def drop(self, selector: str, file: Path) -> None:
        """Drops a file on an element, as a person does with the mouse."""
        self.page.locator(selector).drop({"files": file})

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self.page.keyboard.insert_text(text)

    def press(self, key: str) -> None:
        """Presses a key, such as Tab or Enter."""
        self.page.keyboard.press(key)

    def look(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False, whole: bool = True) -> None:
        """Writes a screenshot (PNG) of the page in a window of this size; whole: to the end of the page."""
        self.resize(width, height)
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=file, full_page=whole)

    def hold(self, name: str) -> None:
        """Data of this name reach the page only after `release`."""
        self.run(
            f"""(() => {{
                const quick = load;
                window.heldName = {json.dumps(name)};
                window.held = new Promise(done => {{ window.goOn = done; }});
                window.load = name => name === heldName ? held.then(() => quick(name)) : quick(name);
            }})()"""
        )

    def release(self) -> None:
        """Lets the page have what was held, and waits until it had the time to show it."""
        self.run("goOn()")
        self.run("load(heldName).then(() => new Promise(done => { setTimeout(done, 100); }))")

    def resize(self, width: int, height: int) -> None:
        self.page.set_viewport_size({"width": width, "height": height})


@contextmanager
def browser() -> Iterator[Browser]:
    """A tab of a Chromium of its own; the test skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright; it comes with lapa-vla[dev]")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as chromium:
        yield Browser(chromium.new_page())
