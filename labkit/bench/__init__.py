"""How fast, beside whom: labkit and its peers, measured by turns in one run. ``labkit bench`` shows it."""
