"""``fold``: the one place that rescales what a layer hands on and undoes it where that is used."""

from __future__ import annotations
