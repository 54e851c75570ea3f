"""Names, label keys and label values as Kubernetes allows them. Each function says what is wrong, or None."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")


def dns_label(name: str, longest: int = 63) -> str | None:
    """RFC 1123: small letters, digits and ``-``; what containers, ports of pods and namespaces are called."""
    return _judged(
        name, _LABEL, longest, "small letters, digits and `-`, with a letter or digit at both ends"
    )


def dns_label_1035(name: str, longest: int = 63) -> str | None:
    """RFC 1035: as ``dns_label``, and the first is a letter; what services and Ray clusters are called."""
    expected = "small letters, digits and `-`, with a letter first and a letter or digit last"
    return _judged(name, _LABEL_1035, longest, expected)


def dns_subdomain(name: str, longest: int = 253) -> str | None:
    """DNS labels with dots between them; what most objects are called."""
    expected = "small letters, digits, `-` and `.`, with a letter or digit at both ends of each part"
    return _judged(name, _SUBDOMAIN, longest, expected)


def label_key(key: str) -> str | None:
    """``name`` or ``prefix/name``, as in ``app.kubernetes.io/name``."""
    prefix, slash, name = key.rpartition("/")
    if slash and (wrong := dns_subdomain(prefix)):
        return f"the part before `/` of the key {key!r}: {wrong}"
    wrong = _judged(
        name, _QUALIFIED, 63, "letters, digits, `-`, `_` and `.`, a letter or digit at both ends"
    )
    return wrong and f"the key {key!r}: {wrong}"


def label_value(value: str) -> str | None:
    """At most 63 letters, digits, ``-``, ``_`` and ``.``; may be empty."""
    expected = "letters, digits, `-`, `_` and `.`, a letter or digit at both ends"
    return _judged(value, _QUALIFIED, 63, expected) if value else None


def labels(found: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with each label, by its key."""
    wrong = {key: label_key(key) or label_value(value) for key, value in found.items()}
    return {key: message for key, message in wrong.items() if message}


def _judged(name: str, pattern: re.Pattern[str], longest: int, expected: str) -> str | None:
    if len(name) > longest:
        return f"expected at most {longest} characters, found {len(name)}"
    if not pattern.fullmatch(name):
        return f"expected {expected}; found {name!r}"
    return None
