"""Elements of a page as text. Whatever is not an element already is escaped, so text of models cannot become one."""

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "meta", "link"})
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


class Html(str):
    """Text that is markup."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """<tag attributes>children</tag>. class_ is class, a_b is a-b; None and False leave an attribute out."""
    opening = "".join([tag, *(_attribute(key, value) for key, value in attributes.items())])
    return Html(f"<{opening}>" if tag in VOID else f"<{opening}>{text(children)}</{tag}>")


def text(child: Child) -> Html:
    """Escaped text, or markup as it is; control characters are shown as their pictures."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return Html(escape(child.translate(_CONTROLS)))
    return Html("".join(text(each) for each in child))


def section(identifier: str, title: str, *children: Child) -> Html:
    """A part of the page under a heading."""
    heading = element("h2", title, id=f"{identifier}-title")
    return element("section", heading, *children, id=identifier, aria_labelledby=f"{identifier}-title")


def note(*children: Child) -> Html:
    """How something was measured, or is to be read."""
    return element("p", *children, class_="note")


def folded(summary: str, *children: Child, on_paper: bool = False) -> Html:
    """What is shown when it is asked for, and on paper if it is short."""
    return element("details", element("summary", summary), *children, class_="short" if on_paper else None)


def table(head: Iterable[str], rows: Iterable[Iterable[Child]], caption: str) -> Html:
    """A table whose first column names the rows; on a narrow screen it is moved by itself."""
    columns = element("thead", element("tr", [element("th", name, scope="col") for name in head]))
    body = element("tbody", [_row(*row) for row in rows])
    inner = element("table", element("caption", caption, class_="unseen"), columns, body)
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _row(first: Child, *others: Child) -> Html:
    return element("tr", element("th", first, scope="row"), [element("td", cell) for cell in others])


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(shown.translate(_CONTROLS))}"'
