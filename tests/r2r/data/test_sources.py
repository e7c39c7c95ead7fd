"""What the keys of a data source mean, and which values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from r2r.data.sources import build_source
from r2r.errors import InputError

TASKS = ("denoise", "derain", "dejpeg")


def test_keys_of_mixtures(photo_folder: Path) -> None:
    source = build_source(
        {
            "task": [],
            "optional": "dejpeg",
            "clean": [photo_folder, str(photo_folder)],
            "share": 2,
            "reduce": "0.5..0.8",
        },
        TASKS,
    )
    assert (source.name, source.labels, source.optional, source.share) == ("clean", (), (2,), 2)
    assert source.reduce == (0.5, 0.8)
    assert len(source.pairs) == 2 * len({pair.clean for pair in source.pairs})
    one = build_source({"task": "denoise", "clean": photo_folder, "reduce": 0.5, "first": 2}, TASKS)
    assert (one.reduce, len(one.pairs), one.share) == ((0.5, 0.5), 2, None)
    assert [pair.name for pair in one.pairs] == [pair.name for pair in source.pairs[:2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sharpen"}, "unknown task 'sharpen'"),
        ({"task": None}, r"needs a task; the run's tasks are denoise, derain, dejpeg, \[\] where nothing is wrong"),
        ({"optional": "fog"}, "unknown task 'fog'"),
        ({"share": "much"}, "share is 'much' in a data source; accepted: a number"),
        ({"share": -1}, r"share -1; accepted: numbers above 0"),
        ({"reduce": "small"}, "reduce is 'small' in a data source; accepted: a number or low..high"),
        ({"reduce": 2}, r"reduce \(2.0, 2.0\); accepted: low..high within 0 and 1"),
        ({"first": 0}, "first is 0 in a data source; accepted: 1 or more"),
        ({"size": 3}, "unknown key 'size'"),
    ],
)
def test_what_is_refused(photo_folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_source({"task": "denoise", "clean": photo_folder, **change}, TASKS)
