"""The page loads nothing, and its policy lets nothing in but its own script and style."""

import base64
import hashlib
import re

from quantkit.server.page import page_response


def test_the_policy_names_the_script_and_the_style_and_nothing_else():
    response = page_response()
    html = bytes(response.body).decode()
    policy = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in response.headers["Content-Security-Policy"]


def test_the_page_names_no_other_host_and_never_parses_html():
    html = bytes(page_response().body).decode()
    for forbidden in (
        "http:",
        "https:",
        "//cdn",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ):
        assert forbidden not in html
    assert not re.search(
        r"<[^>]+\s(on\w+|style)=", html.partition("<script>")[0]
    )  # the policy would block them
