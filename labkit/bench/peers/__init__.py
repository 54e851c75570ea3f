"""Peers on the far side of a pipe. These files run in environments that hold no labkit; see ``speak.py``."""
