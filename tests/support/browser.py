"""A real browser without a window: Debian's Chromium, driven by its chromedriver."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.requirements import require

_PAGE_SECONDS = 60
#: No sandbox: the tests may run as root, and every page is our own.
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1400")


class Browser:
    """Opens pages with a user's name and password, and reads what is on them."""

    def __init__(self, driver: Chrome, user: str, password: str) -> None:
        self._driver = driver
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {credentials}"}})

    def open(self, url: str) -> None:
        self._driver.get(url)

    def texts(self, selector: str) -> list[str]:
        """The visible texts of all that a CSS selector finds now."""
        return [element.text for element in self._driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait_for(self, selector: str, text: str) -> list[str]:
        """The texts behind a selector once one of them holds ``text``: pages fill their tables after they loaded."""

        def shown(_: Chrome) -> list[str] | None:
            found = self.texts(selector)
            return found if any(text in one for one in found) else None

        return WebDriverWait(self._driver, _PAGE_SECONDS).until(shown, f"{text!r} in {selector} of {self.url}")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; ``arguments`` are those of its function."""
        return self._driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        """Keys, one after the other, wherever the focus is; ``selenium.webdriver.Keys`` names the others."""
        ActionChains(self._driver).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        """A click where the first element is, as a user can do it: nothing may be in the way."""
        self._driver.find_element(By.CSS_SELECTOR, selector).click()

    def write(self, selector: str, text: str) -> None:
        """Text into a field, instead of what was there."""
        field = self._driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(text)

    def screen(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """The size of the page in CSS pixels, and what the user's system prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def accessibility(self) -> list[dict[str, Any]]:
        """What a screen reader is told: the nodes that are not ignored."""
        nodes = self._driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [node for node in nodes if not node["ignored"]]

    def complaints(self) -> list[str]:
        """Errors of the console since the last look: scripts', policies' and of what could not be loaded."""
        entries = self._driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    @property
    def url(self) -> str:
        return self._driver.current_url

    def source(self) -> str:
        """The page as it stands, scripts' work included."""
        return self._driver.page_source

    def screenshot(self, path: Path) -> Path:
        """Save what a user would see as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self._driver.save_screenshot(str(path)), f"{path} was not written"
        return path


@contextmanager
def browsing(user: str, password: str) -> Iterator[Browser]:
    """A browser for the block; the test is skipped where there is none."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        require("chromium", "no chromium and chromedriver on the machine (Debian: chromium, chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for option in (*_OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        driver = Chrome(options, ChromeService(chromedriver))
        try:
            yield Browser(driver, user, password)
        finally:
            driver.quit()
