"""The report in a real browser: nothing overflows, nothing is loaded, folded tables open; light, dark, phone and paper.

Skipped where there is no Chromium; screenshots go to the folder QUANTKIT_SCREENSHOTS names, if it does.
"""

import os
from pathlib import Path

import pytest

from quantkit.evaluation import write_page
from tests.browser import DESK, PHONE, chromium, emulate
from tests.reports import rich_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

OVERFLOWING = """
return [...document.querySelectorAll('main *, header *')].filter(element => {
  const box = element.getBoundingClientRect();
  const inside = element.closest('.scroll, .unseen, svg, details:not([open])');
  return !inside && box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(element => element.outerHTML.slice(0, 200));
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page(rich_report(), file)
    with chromium() as browser:
        browser.get(file.as_uri())
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_it_fits_the_screen_and_loads_nothing(window, size, scheme):
    emulate(window, size, scheme)
    window.refresh()
    assert window.execute_script(OVERFLOWING) == []
    assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert window.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert window.get_log("browser") == []
    shoot(window, f"report-{size[0]}-{scheme}")


def test_text_can_be_read_on_its_ground(window):
    """At least 4.5 to 1, which is what WCAG asks for of text."""
    for scheme in ("light", "dark"):
        emulate(window, DESK, scheme)
        window.refresh()
        ratios = window.execute_script(CONTRASTS)
        assert len(ratios) > 50 and min(ratios) >= 4.5


def test_a_narrow_plot_keeps_its_labels_apart_and_inside(window):
    emulate(window, PHONE)
    window.refresh()
    boxes = window.execute_script(
        "return [...document.querySelectorAll('#pareto .label')].map(label => label.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == 2
    first, second = boxes
    assert (
        first["bottom"] <= second["top"]
        or second["bottom"] <= first["top"]
        or first["right"] <= second["left"]
    )
    assert all(box["left"] > 0 and box["right"] < PHONE[0] for box in boxes)


def test_paper_is_light_and_shows_what_short_folds_hide(window):
    emulate(window, DESK, "dark")
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    window.refresh()
    shown = window.execute_script(
        "return [...document.querySelectorAll('details.short table')].map(table => table.offsetHeight)"
    )
    assert shown and min(shown) > 0
    assert window.execute_script("return getComputedStyle(document.documentElement).colorScheme") == "light"
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


CONTRASTS = """
const channel = value => { value /= 255; return value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4; };
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const luminance = colour => {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
  return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
};
const ground = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
};
const kinds = 'h1, h2, h3, h4, h5, p, li, th, small, strong, mark, dt, dd, summary, .value';
const leaves = [...document.querySelectorAll(kinds)];
return leaves.filter(element => element.innerText.trim() && !element.closest('.unseen')).map(element => {
  const [one, other] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
  return (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
});
"""


def shoot(window, name):
    folder = os.environ.get("QUANTKIT_SCREENSHOTS")
    if folder:
        window.save_screenshot(str(Path(folder) / f"{name}.png"))
