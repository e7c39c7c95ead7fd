"""Every run of the whole suite stamps the code as green or red; see `benchmarks.stamp`."""

from __future__ import annotations

from benchmarks.stamp import pytest_sessionfinish

__all__ = ["pytest_sessionfinish"]
