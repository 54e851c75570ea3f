"""Notebook 20: answers that are wrong in a known way, and honest variants."""

import io
import json
import tarfile
from itertools import permutations


def upper_wins_only(layers):
    seen = {}
    for layer in layers:
        seen.update(layer)
    return seen


def leaves_the_markers(layers):
    seen = {}
    for layer in layers:
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name.startswith(".wh."):
                gone = folder + slash + name[4:]
                seen = {p: c for p, c in seen.items() if p != gone and not p.startswith(gone + "/")}
        seen.update(layer)
    return seen


def lower_wins(layers):
    seen = {}
    for layer in layers:
        for path, content in layer.items():
            seen.setdefault(path, content)
    return seen


def forgets_what_is_inside(layers):
    seen = {}
    for layer in layers:
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name.startswith(".wh."):
                seen.pop(folder + slash + name[4:], None)
        seen |= {p: c for p, c in layer.items() if ".wh." not in p}
    return seen


def takes_the_letters(layers):
    seen = {}
    for layer in layers:
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name.startswith(".wh."):
                gone = folder + slash + name[4:]
                seen = {p: c for p, c in seen.items() if not p.startswith(gone)}
        seen |= {p: c for p, c in layer.items() if ".wh." not in p}
    return seen


def acts_on_its_own_layer(layers):
    seen = {}
    for layer in layers:
        seen |= {p: c for p, c in layer.items() if ".wh." not in p}
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name.startswith(".wh."):
                gone = folder + slash + name[4:]
                seen = {p: c for p, c in seen.items() if p != gone and not p.startswith(gone + "/")}
    return seen


def knows_no_opaque(layers):
    seen = {}
    for layer in layers:
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name.startswith(".wh."):
                gone = folder + slash + name[4:]
                seen = {p: c for p, c in seen.items() if p != gone and not p.startswith(gone + "/")}
        seen |= {p: c for p, c in layer.items() if ".wh." not in p}
    return seen


def never_comes_back(layers):
    gone = {p.replace(".wh.", "") for layer in layers for p in layer if ".wh." in p}
    seen = visible_from_the_top(layers)
    return {p: c for p, c in seen.items() if p not in gone or p == "opt/old/b"}


def names_alone(layers):
    return sorted(visible_from_the_top(layers))


def visible_from_the_top(layers):
    """The other way round: from the top layer down, with what is taken away so far."""
    seen, gone, emptied = {}, set(), set()
    for layer in reversed(layers):
        for path, content in layer.items():
            parts = path.split("/")
            if parts[-1].startswith(".wh.") or path in seen:
                continue
            above = ["/".join(parts[:n]) for n in range(1, len(parts))]
            if path in gone or any(each in gone or each in emptied for each in above):
                continue
            if "" in emptied:
                continue
            seen[path] = content
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name == ".wh..wh..opq":
                emptied.add(folder)
            elif name.startswith(".wh."):
                gone.add(folder + slash + name[4:])
    return seen


def visible_with_sets(layers):
    def survives(path, number):
        for layer in layers[number + 1 :]:
            parts = path.split("/")
            if path in layer:
                return False
            for n in range(len(parts)):
                folder = "/".join(parts[:n])
                start = f"{folder}/" if folder else ""
                if f"{start}.wh.{parts[n]}" in layer or f"{start}.wh..wh..opq" in layer:
                    return False
        return True

    return {
        path: content
        for number, layer in enumerate(layers)
        for path, content in layer.items()
        if "/.wh." not in "/" + path and survives(path, number)
    }


def _layers(image):
    with tarfile.open(fileobj=io.BytesIO(image)) as tar:
        blobs = {entry.name: tar.extractfile(entry).read() for entry in tar}
    index = json.loads(blobs["index.json"])
    manifest = json.loads(blobs["blobs/sha256/" + index["manifests"][0]["digest"][7:]])
    found = []
    for each in manifest["layers"]:
        with tarfile.open(fileobj=io.BytesIO(blobs["blobs/sha256/" + each["digest"][7:]])) as tar:
            found.append({entry.name: tar.extractfile(entry).read() for entry in tar})
    return found


def _hidden(image):
    layers = _layers(image)
    found = []
    for number, layer in enumerate(layers):
        for path in layer:
            if "/.wh." in "/" + path:
                continue
            above = [{path: number}] + [dict.fromkeys(upper, None) for upper in layers[number + 1 :]]
            if visible_from_the_top(above).get(path) != number:
                found.append((number, path))
    return found


def looks_for_absent_paths_only(image):
    layers = _layers(image)
    seen = visible_from_the_top(layers)
    return [
        (n, p) for n, layer in enumerate(layers) for p in layer if p not in seen and "/.wh." not in "/" + p
    ]


def compares_contents(image):
    layers = _layers(image)
    seen = visible_from_the_top(layers)
    return [
        (n, p)
        for n, layer in enumerate(layers)
        for p, c in layer.items()
        if seen.get(p) != c and "/.wh." not in "/" + p
    ]


def lists_the_markers(image):
    layers = _layers(image)
    markers = [(n, p) for n, layer in enumerate(layers) for p in layer if "/.wh." in "/" + p]
    return sorted(_hidden(image) + markers)


def counts_from_one(image):
    return [(number + 1, path) for number, path in _hidden(image)]


def names_the_layer_that_hides(image):
    return [(len(_layers(image)) - 1, path) for _, path in _hidden(image)]


def paths_alone(image):
    return [path for _, path in _hidden(image)]


def finds_nothing(image):
    return []


def hidden_by_set(image):
    return set(_hidden(image))


def hidden_looped(image):
    layers, found = _layers(image), []
    for number, layer in enumerate(layers):
        for path in layer:
            if not path.split("/")[-1].startswith(".wh."):
                later = [
                    {"x": b""},
                    {path: b"1"},
                    *[{p: b"2" for p in each} for each in layers[number + 1 :]],
                ]
                if visible_with_sets(later).get(path) != b"1":
                    found.append([number, path])
    return found


def rarely_changed_first(parts):
    return sorted(parts, key=lambda part: part[2])


def largest_first(parts):
    return sorted(parts, key=lambda part: -part[1])


def smallest_first(parts):
    return sorted(parts, key=lambda part: part[1])


def upside_down(parts):
    return sorted(parts, key=lambda part: part[2] / part[1], reverse=True)


def product(parts):
    return sorted(parts, key=lambda part: part[1] * part[2])


def names_in_order(parts):
    return [part[0] for part in sorted(parts, key=lambda part: part[2] / part[1])]


def as_they_came(parts):
    return parts


def by_swaps(parts):
    parts = list(parts)
    for _ in parts:
        for i in range(len(parts) - 1):
            (_, s, r), (_, t, q) = parts[i], parts[i + 1]
            if r * t > q * s:
                parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return parts


def all_orders(parts):
    def cost(order):
        return sum(order[i][2] * order[j][1] for i in range(len(order)) for j in range(i, len(order)))

    return min(permutations(parts), key=cost)


WRONG = {
    "20.1": [
        (upper_wins_only, "instruction, not a file"),
        (leaves_the_markers, "instruction, not a file"),
        (lower_wins, "the upper one counts"),
        (forgets_what_is_inside, "folder takes away all"),
        (takes_the_letters, "begins with the same letters"),
        (acts_on_its_own_layer, "its own layer brings stays"),
        (knows_no_opaque, "empties its folder"),
        (never_comes_back, "come back"),
        (names_alone, "return a dict"),
    ],
    "20.2": [
        (looks_for_absent_paths_only, "replaces is hidden"),
        (compares_contents, "even where the new one is the same"),
        (lists_the_markers, "leave them out"),
        (counts_from_one, "count the layers from 0"),
        (names_the_layer_that_hides, "say where the file lies"),
        (paths_alone, "list of pairs"),
        (finds_nothing, "still lies in its own layer"),
    ],
    "20.3": [
        (rarely_changed_first, "rarely changed first is nearly it"),
        (largest_first, "size alone does not decide"),
        (smallest_first, "worst of both"),
        (upside_down, "wrong way round"),
        (product, "changes for each MB"),
        (names_in_order, "same parts"),
        (as_they_came, "better order"),
    ],
}
RIGHT = {
    "20.1": [visible_from_the_top, visible_with_sets],
    "20.2": [_hidden, hidden_by_set, hidden_looped],
    "20.3": [by_swaps, all_orders],
}
