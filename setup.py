"""Builds the distribution; everything that does not need code is in pyproject.toml."""

from setuptools import setup

setup()
