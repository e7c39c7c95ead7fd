"""What is an address in object storage, and what a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2r.storage import Address, location


@pytest.mark.parametrize(
    "name", ["s3://bucket/a.jpg", "gs://bucket/photos/", "abfss://container@account/a b.png", "a-b+c://x"]
)
def test_a_scheme_makes_an_address(name: str) -> None:
    found = location(name)
    assert isinstance(found, Address)
    assert str(found) == name.rstrip("/")
    assert location(found) is found


@pytest.mark.parametrize("name", ["photos/a.jpg", "C://photos/a.jpg", "/mnt/what: a photo://1.jpg", "-"])
def test_other_names_are_paths(name: str) -> None:
    assert location(name) == Path(name)
