"""
Profiles, strategies and checks of the property tests.

`HYPOTHESIS_PROFILE=long` tries `LONG_TIMES` as many cases, and different ones in each run. By default the cases are the
same in each run.
"""

import copy
import faulthandler
import os
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, currently_in_test_context, event, settings, strategies as st


LONG_TIMES = 14
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
_TIME_LIMIT = 600  # seconds for one call, on a busy machine, too

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", derandomize=True, database=None, **_COMMON)
settings.register_profile("long", **_COMMON)
settings.load_profile(_PROFILE)


def cases(number: int) -> settings:
    """Settings of a test with a number of cases, which a long run multiplies."""
    return settings(max_examples=number * (LONG_TIMES if _PROFILE == "long" else 1))


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Return the result of a call, or the error if it is of a documented kind and says what was wrong. Any other error is
    raised, and a call that does not end stops the process.
    """
    faulthandler.dump_traceback_later(_TIME_LIMIT, exit=True)
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        # StrictDataclassError is what transformers raises for fields and options of another type.
        if isinstance(error, UnicodeError) or len(str(error)) < 15:
            raise
        if currently_in_test_context():  # fuzzing calls this, too
            event("refused")
        return error
    finally:
        faulthandler.cancel_dump_traceback_later()


# Values of every kind that JSON can hold, including the odd ones: NaN, numbers beyond 64 bits, halves of surrogates
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
WHOLE_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
# Without characters that Python's Unicode tables, which may be older than the tokenizer's, do not know
KNOWN_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cn"]), max_size=20)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30]),
    st.integers(-3, 20),
    st.floats(),
)
_SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT)
JSON_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
# The same and values that only Python knows
PYTHON_VALUES = st.one_of(
    JSON_VALUES,
    st.binary(max_size=20),
    st.tuples(_SCALARS, _SCALARS),
    st.sets(st.integers(), max_size=3),
    st.just(object()),
    st.complex_numbers(),
)


def _list_places(content: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) in nested lists and dicts."""
    if not isinstance(content, (dict, list)):
        return []
    keys = list(content) if isinstance(content, dict) else range(len(content))
    return [place for key in keys for place in [(content, key), *_list_places(content[key])]]


@st.composite
def damaged(draw: st.DrawFn, content: Any, values: st.SearchStrategy = JSON_VALUES, max_changes: int = 2) -> Any:
    """A copy of nested lists and dicts in which values are missing, replaced, or taken from another place."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(0, max_changes))):
        places = _list_places(content)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("remove", "replace", "move")))
        if change == "remove":
            del container[key]
        elif change == "replace":
            container[key] = draw(values)
        else:
            other, other_key = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[other_key])
    return content


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A copy of a file's bytes with some of them cut off, replaced, removed or repeated."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 16, len(content))))
        change = draw(st.sampled_from(("cut", "replace", "remove", "repeat")))
        if change == "cut":
            content = content[:start]
        elif change == "replace":
            content = content[:start] + draw(st.binary(max_size=8)) + content[end:]
        else:
            content = content[:start] + (2 * content[start:end] if change == "repeat" else b"") + content[end:]
    return content
