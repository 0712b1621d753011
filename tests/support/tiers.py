"""The two tiers of the suite: `pytest tests` runs a selection in minutes, `pytest tests --exhaustive` runs everything.
`pytest tests --beyond-default` runs what the first has left to the second.

A test leaves the default tier for one of two reasons. Its own mark says so (`pytest.mark.exhaustive`, on a test or on
one of its parameters), because it is slow and something faster touches the same code. Or its parameters bring nothing
new: of a test's parameter sets, the default tier keeps one for each value of each parameter on each backend, where the
fields of a case count as parameters.
"""

import dataclasses
import zlib
from collections import defaultdict

from cases import LinearCase, SparseCase


def is_exhaustive(config) -> bool:
    """A test that is named by its node id runs as a whole, too: whoever names it wants to see it."""
    options = config.getoption("--exhaustive"), config.getoption("--beyond-default")
    return any(options) or any("::" in argument for argument in config.args)


def default_tier(items: list) -> list:
    """Those of the default tier. Which ones they are depends on the tests' names alone, so every run takes the same."""
    taken, seen = set(), defaultdict(set)
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        if item.get_closest_marker("exhaustive"):
            continue
        values, seen_of_test = _values(item), seen[item.nodeid.split("[")[0]]
        if not values <= seen_of_test:
            taken.add(item)
            seen_of_test |= values
    return [item for item in items if item in taken]


def beyond_default(items: list) -> list:
    """What the default tier leaves out, and tests that do more in the exhaustive tier or have other cases there."""
    default = set(default_tier(items))

    def differs(item) -> bool:
        return "exhaustive" in item.fixturenames or item.get_closest_marker("cases_by_tier") is not None

    return [item for item in items if item not in default or differs(item)]


def _values(item) -> set[tuple]:
    """What a parameter set brings: each value on its backend, and each pattern of a case with each dtype there."""
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    case = parameters.get("case")
    if isinstance(case, (LinearCase, SparseCase)):
        parameters |= {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        parameters["case"] = parameters.get("dtype"), case.pattern
    place = parameters.get("backend"), str(parameters.get("device"))
    return {(*place, name, repr(value)) for name, value in (parameters | {"": ""}).items()}
