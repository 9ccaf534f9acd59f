"""A family of three routes that compute nothing, for tests of what chooses among them."""

from quantkit_kernels.family import Family, Route


def unused(*arguments, **more):
    raise AssertionError("a route was run")


SKINNY = Route(name="skinny", run=unused, max_rows=32, min_capability=(9, 0))
TILE = Route(name="tile", run=unused, min_capability=(9, 0), max_capability=(9, 0))
DENSE = Route(name="dense", run=unused)
FAMILY = Family(name="w4a16", routes=(SKINNY, TILE, DENSE), prepare=unused, weight_bytes=0.5)
FAMILIES = {"w4a16": FAMILY}
