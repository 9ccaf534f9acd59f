"""Where each candidate loses: layers by kinds of linears, the worst linears, positions and kinds of tokens."""

from collections.abc import Sequence

from quantkit.evaluation.page.figures import damage_of, measured, names, nats, percent
from quantkit.evaluation.page.html import Html, element, folded, note, section, table
from quantkit.evaluation.page.plot import bars
from quantkit.evaluation.report import LAYER, DamageMap, EvalReport, LinearDamage

NUM_WORST = 8


def heatmap(report: EvalReport) -> Html | None:
    """Nothing if no candidate has a map."""
    called = names(report)
    maps = [(called[c.path], c.where) for c in measured(report) if c.where is not None]
    if not maps:
        return None
    return section(
        "where",
        "Where it hurts",
        element("div", [_map(name, found) for name, found in maps], class_="maps"),
        note(
            "In: the KL of the original with one linear of the candidate, which is what the shades show, the darkest "
            "being the candidate's worst. Out: what the candidate gains with the original's. The last column, whose "
            "shades are its own, swaps all linears of a layer at once. Hatched linears are the same in both."
        ),
        [
            folded(f"All linears of {name}", _all(name, found.linears))
            for name, found in maps
            if found.linears
        ],
    )


def _map(name: str, found: DamageMap) -> Html:
    linears = [linear for linear in found.linears if linear.kind != LAYER]
    measured_on = f"Swapped on {found.windows} windows of {found.length} tokens."
    return element(
        "article",
        element("h3", name),
        [_grid(name, found.linears), _worst(linears)]
        if linears
        else note("Its linears are the original's: nothing to swap."),
        element("h4", "By kind of the token that comes next"),
        bars(
            [(kind, kl, f"{nats(kl)} · {percent(share)}") for kind, share, kl in found.by_class],
            "KL by kind of token",
        ),
        element("h4", "By position in the window"),
        bars(
            [(_positions(*bucket[:2]), bucket[2], nats(bucket[2])) for bucket in found.by_position],
            "KL by position",
        ),
        note(measured_on) if linears else None,
        class_="card",
    )


def _positions(first: int, last: int) -> str:
    return f"{first}" if last == first + 1 else f"{first} to {last - 1}"


def _grid(name: str, linears: Sequence[LinearDamage]) -> Html:
    """A table of shades; each cell has its figure for those who cannot see them."""
    inside = [linear for linear in linears if linear.layer is not None]
    kinds = [kind for kind in dict.fromkeys(linear.kind for linear in inside) if kind != LAYER] + [LAYER]
    cells = {(linear.layer, linear.kind): linear for linear in inside}
    worst = {
        is_layer: max((c.kl_in for c in inside if (c.kind == LAYER) == is_layer), default=0)
        for is_layer in (False, True)
    }
    head = element(
        "tr", element("th", "", scope="col"), [element("th", _kind(kind), scope="col") for kind in kinds]
    )
    rows = [
        element(
            "tr",
            element("th", str(layer), scope="row"),
            [_cell(cells.get((layer, kind)), worst[kind == LAYER]) for kind in kinds],
        )
        for layer in sorted({linear.layer for linear in inside if linear.layer is not None})
    ]
    caption = element("caption", f"KL by layer and linear, {name}", class_="unseen")
    grid = element("table", caption, element("thead", head), element("tbody", rows), class_="heat")
    others = [(linear.kind, linear.kl_in, nats(linear.kl_in)) for linear in linears if linear.layer is None]
    return element("div", grid, bars(others, "Outside of the layers") if others else None, class_="scroll")


def _kind(kind: str) -> Html:
    return element("span", kind.removesuffix("_proj"))


def _cell(linear: LinearDamage | None, worst: float) -> Html:
    if linear is None:
        return element(
            "td", element("span", "not quantized", class_="unseen"), class_="kept", title="not quantized"
        )
    shade = (max(linear.kl_in, 0) / worst) ** 0.5 if worst else 0
    title = f"{linear.linear}: in {nats(linear.kl_in)}, out {nats(linear.kl_out)}"
    return element(
        "td", element("span", nats(linear.kl_in), class_="unseen"), style=f"--v:{shade:.3f}", title=title
    )


def _worst(linears: Sequence[LinearDamage]) -> Html:
    worst = sorted(linears, key=lambda linear: -linear.kl_in)[:NUM_WORST]
    rows = [(_short(linear), linear.kl_in, damage_of(linear)) for linear in worst]
    return element("div", element("h4", "The worst linears: in · out"), bars(rows, "The worst linears"))


def _short(linear: LinearDamage) -> str:
    return linear.kind if linear.layer is None else f"{linear.layer} {linear.kind}"


def _all(name: str, linears: Sequence[LinearDamage]) -> Html:
    rows = [(linear.linear, nats(linear.kl_in), nats(linear.kl_out)) for linear in linears]
    return table(("linear", "in", "out"), rows, f"KL by linear, {name}")
