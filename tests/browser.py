"""A headless Chromium, where there is one: selenium drives it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PHONE = (390, 844)
DESK = (1200, 850)


@contextmanager
def chromium(size: tuple[int, int] = DESK) -> Iterator[Any]:
    """Its driver; skips where browser or driver are missing, which `apt install chromium chromium-driver` and
    `pip install selenium` mend.

    The window is not resized to a phone's width but emulated as one: windows have a least width.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        emulate(window, size)
        yield window
    finally:
        window.quit()


def emulate(window: Any, size: tuple[int, int], scheme: str = "light") -> None:
    """A screen of this size, and a system in this colour scheme."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
