"""Each mistake of `docs/mistakes.md` gets the sentence that the page promises."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mistakes import MISTAKES

ROWS = re.findall(
    r"^\| (.+?) \| (.+?) \| (a warning: )?`` (.+) `` \|$",
    (Path(__file__).parents[1] / "docs/mistakes.md").read_text(),
    re.MULTILINE,
)
SAID = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError, MisconfigurationException, SystemExit)


@pytest.mark.parametrize(("where", "what", "warns", "sentence"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_sentence(where: str, what: str, warns: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if warns:
            MISTAKES[where][what]()
            told = "\n".join(str(one.message) for one in caught)
        else:
            with pytest.raises(SAID) as raised:
                MISTAKES[where][what]()
            # the parser of the command line prints what is wrong, and exits
            told = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert sentence in told


def test_the_page_has_a_row_for_each_mistake() -> None:
    assert [(where, what) for where, what, *_ in ROWS] == [(room, what) for room in MISTAKES for what in MISTAKES[room]]
    assert min(Counter(where for where, *_ in ROWS).values()) >= 8
