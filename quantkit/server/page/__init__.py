"""The chat page: one file, with all of its script and style; the browser is told to run and load nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

HTML = (Path(__file__).parent / "chat.html").read_bytes()


def page_response() -> Response:
    """The page. Its policy names its script and its style by their digests: whatever else gets into it is dead."""
    return Response(HTML, media_type="text/html", headers=HEADERS)


def _policy() -> str:
    rules = {
        "default-src": "'none'",
        "script-src": _digests("script"),
        "style-src": _digests("style"),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digests(tag: str) -> str:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), HTML, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content).digest()).decode() for content in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": _policy(),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
