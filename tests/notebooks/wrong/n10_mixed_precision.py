"""Notebook 10: answers that are wrong in a known way, and honest variants."""


def _total(sizes, bits, group, scale=16):
    return sum(n * bits[p] + n / group * (scale + bits[p]) for p, n in sizes.items())


def codes_only(sizes, bits, group):
    return sum(n * bits[p] for p, n in sizes.items()) / sum(sizes.values())


def scales_only(sizes, bits, group):
    return codes_only(sizes, bits, group) + 16 / group


def zeros_only(sizes, bits, group):
    return _total(sizes, bits, group, scale=0) / sum(sizes.values())


def zeros_of_16_bits(sizes, bits, group):
    return codes_only(sizes, bits, group) + 32 / group


def one_group_each(sizes, bits, group):
    return sum(n * bits[p] + 16 + bits[p] for p, n in sizes.items()) / sum(sizes.values())


def mean_over_parts(sizes, bits, group):
    return sum(b + (16 + b) / group for b in bits.values()) / len(bits)


def mean_of_codes(sizes, bits, group):
    return sum(bits.values()) / len(bits)


def all_bits(sizes, bits, group):
    return _total(sizes, bits, group)


def bytes_each(sizes, bits, group):
    return _total(sizes, bits, group) / 8 / sum(sizes.values())


def part_by_part(sizes, bits, group):
    used = count = 0
    for part in sizes:
        groups = sizes[part] // group
        used += groups * (group * bits[part] + 16 + bits[part])
        count += sizes[part]
    return used / count


def as_a_weighted_mean(sizes, bits, group):
    whole = sum(sizes.values())
    return sum(n / whole * (bits[p] * (1 + 1 / group) + 16 / group) for p, n in sizes.items())


def _by(score, stop=False, strict=False, last=False):
    def climb(sizes, kl, budget):
        chosen = {p: min(kl[p]) for p in sizes}
        left = budget * sum(sizes.values()) - sum(n * chosen[p] for p, n in sizes.items())
        while True:
            best = None
            for p, n in sizes.items():
                wider = sorted(b for b in kl[p] if b > chosen[p])
                if not wider:
                    continue
                added = n * (wider[0] - chosen[p])
                fits = added < left if strict else added <= left
                if not fits and not stop and not last:
                    continue
                now = score(kl[p][chosen[p]] - kl[p][wider[0]], added, kl[p][chosen[p]])
                if best is None or now > best[0]:
                    best = (now, p, wider[0], added)
            if best is None or (best[3] > left and not last):
                return chosen
            chosen[best[1]] = best[2]
            left -= best[3]
            if left < 0:
                return chosen

    return climb


def most_saved(sizes, kl, budget):
    return _by(lambda saved, added, now: saved)(sizes, kl, budget)


def largest_kl(sizes, kl, budget):
    return _by(lambda saved, added, now: now)(sizes, kl, budget)


def largest_kl_per_bit(sizes, kl, budget):
    return _by(lambda saved, added, now: now / added)(sizes, kl, budget)


def cheapest(sizes, kl, budget):
    return _by(lambda saved, added, now: -added)(sizes, kl, budget)


def stops_at_the_first(sizes, kl, budget):
    return _by(lambda saved, added, now: saved / added, stop=True)(sizes, kl, budget)


def never_quite_full(sizes, kl, budget):
    return _by(lambda saved, added, now: saved / added, strict=True)(sizes, kl, budget)


def one_too_many(sizes, kl, budget):
    return _by(lambda saved, added, now: saved / added, last=True)(sizes, kl, budget)


def nothing_bought(sizes, kl, budget):
    return {p: min(kl[p]) for p in sizes}


def everything_bought(sizes, kl, budget):
    return {p: max(kl[p]) for p in sizes}


def a_list(sizes, kl, budget):
    return list(_good(sizes, kl, budget).values())


def a_part_forgotten(sizes, kl, budget):
    return dict(list(_good(sizes, kl, budget).items())[1:])


def widths_between(sizes, kl, budget):
    return {p: budget for p in sizes}


def _good(sizes, kl, budget):
    return _by(lambda saved, added, now: saved / added)(sizes, kl, budget)


def by_sorting(sizes, kl, budget):
    """Widths in a list for each part, and a position in it."""
    grid = {p: sorted(kl[p]) for p in sizes}
    at = dict.fromkeys(sizes, 0)
    total = budget * sum(sizes.values())

    def used():
        return sum(n * grid[p][at[p]] for p, n in sizes.items())

    while True:
        options = []
        for p, n in sizes.items():
            if at[p] + 1 < len(grid[p]):
                a, b = grid[p][at[p]], grid[p][at[p] + 1]
                if used() + n * (b - a) <= total + 1e-9:
                    options.append(((kl[p][b] - kl[p][a]) / (n * (b - a)), p))
        if not options:
            return {p: grid[p][at[p]] for p in sizes}
        at[min(options)[1]] += 1


WRONG = {
    "10.1": [
        (codes_only, "not in it"),
        (scales_only, "zero points are not in it"),
        (zeros_only, "scales are not in it"),
        (zeros_of_16_bits, "not 16"),
        (one_group_each, "once for each group"),
        (mean_over_parts, "mean over the parts"),
        (mean_of_codes, "mean over the parts"),
        (all_bits, "divide by the number of weights"),
        (bytes_each, "bytes per weight"),
    ],
    "10.2": [
        (most_saved, "divide by the bits"),
        (largest_kl, "largest KL"),
        (largest_kl_per_bit, "what a part costs now"),
        (cheapest, "adds fewest bits"),
        (stops_at_the_first, "does not fit; a smaller one"),
        (never_quite_full, "fits exactly"),
        (one_too_many, "does not fit any more"),
        (nothing_bought, "fewest bits"),
        (everything_bought, "the budget is"),
        (a_list, "expected a dict"),
        (a_part_forgotten, "has the parts"),
        (widths_between, "was measured at"),
    ],
}
RIGHT = {"10.1": [part_by_part, as_a_weighted_mean], "10.2": [by_sorting]}
