"""What every method says of itself: where it is from, what it costs, and what it asks of operator and prior.

A method enters by being a file of `invrecon/methods`. The docstring has to be its own: one that is inherited speaks of
another method.
"""

import inspect
import re

import pytest

import invrecon.methods
from invrecon.discovery import needs_arguments
from invrecon.methods import Method

# Of the text before its arguments, without line breaks; as in `DPS`.
PARTS = {
    "its source ('Source: ...')": r"Source: \S",
    "its number of network evaluations ('1000 evaluations', 'One evaluation a level (100)', 'No evaluations')": (
        r"(?:\d|`|\b[Oo]ne|\b[Nn]o) evaluations?\b"
    ),
    "what it asks ('Asks of the operator its adjoint, of the prior nothing but `D`')": (
        r"Asks of the operator\b[^.]*\bof the prior\b"
    ),
}


def is_method(name, value):
    concrete = inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value)
    return concrete and not name.startswith("_")


KINDS = [value for name, value in vars(invrecon.methods).items() if is_method(name, value)]


def name_of(kind):
    return kind.__name__


def text_of(kind):
    """The docstring of the class itself, up to its arguments, in one line."""
    own = vars(kind).get("__doc__") or ""
    return " ".join(re.split(r"^ *(?:Args|Raises):", own, maxsplit=1, flags=re.MULTILINE)[0].split())


def missing(kind):
    return [part for part, pattern in PARTS.items() if not re.search(pattern, text_of(kind))]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_docstring_says_source_evaluations_and_demands(kind):
    assert not missing(kind), f"The docstring of {kind.__name__} does not say {', nor '.join(missing(kind))}."


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not needs_arguments(kind)], ids=name_of)
def test_the_number_of_evaluations_is_that_of_the_defaults(kind):
    text, num = text_of(kind), kind().num_evaluations
    expected = r"\b[Nn]o evaluations\b" if num == 0 else rf"(?<![\d.]){num}(?![\d.]*\d)"
    assert re.search(expected, text), f"{kind.__name__} makes {num or 'no'} evaluations; its docstring does not say so."


def test_what_is_inherited_or_said_of_arguments_does_not_count():
    class Silent(invrecon.methods.DPS):
        pass

    class Brief(invrecon.methods.DPS):
        """A method.

        Source: someone, somewhere, Eq. 1.

        Args:
            num_levels: One evaluation each. Asks of the operator nothing, of the prior nothing.
        """

    assert missing(Silent) == list(PARTS)
    assert missing(Brief) == list(PARTS)[1:]
