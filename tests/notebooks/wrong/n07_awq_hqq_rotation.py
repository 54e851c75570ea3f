"""Notebook 07: answers that are wrong in a known way, and honest variants."""

import itertools

import torch


def _search(w, x, steps, size, rounded, error):
    m = size(x)
    found = []
    for i in range(steps + 1):
        s = m ** (i / steps)
        found.append((float(error(rounded(w, s) - w)), i))
    return m ** (min(found)[1] / steps)


def _mean_size(x):
    return x.abs().mean(0)


def divides_first(w, x, quantized, steps):
    return _search(
        w, x, steps, _mean_size, lambda w, s: quantized(w / s) * s, lambda d: (d @ x.T).square().sum()
    )


def never_undone(w, x, quantized, steps):
    return _search(
        w, x, steps, _mean_size, lambda w, s: quantized(w * s), lambda d: (d @ x.T).square().sum()
    )


def compares_weights(w, x, quantized, steps):
    return _search(w, x, steps, _mean_size, lambda w, s: quantized(w * s) / s, lambda d: d.square().sum())


def largest_input(w, x, quantized, steps):
    return _search(
        w,
        x,
        steps,
        lambda x: x.abs().amax(0),
        lambda w, s: quantized(w * s) / s,
        lambda d: (d @ x.T).square().sum(),
    )


def signed_mean(w, x, quantized, steps):
    return _search(
        w,
        x,
        steps,
        lambda x: x.mean(0).abs(),
        lambda w, s: quantized(w * s) / s,
        lambda d: (d @ x.T).square().sum(),
    )


def root_mean_square(w, x, quantized, steps):
    return _search(
        w,
        x,
        steps,
        lambda x: x.square().mean(0).sqrt(),
        lambda w, s: quantized(w * s) / s,
        lambda d: (d @ x.T).square().sum(),
    )


def no_search(w, x, quantized, steps):
    return x.abs().mean(0)


def without_asking(w, x, quantized, steps):
    quantized(w)
    return torch.ones(w.shape[1])


def always_the_same(w, x, quantized, steps):
    quantized(w)
    return x.abs().mean(0) ** 0.4


def per_row(w, x, quantized, steps):
    quantized(w)
    return torch.ones(w.shape[0] + 1)


def with_a_hessian(w, x, quantized, steps):
    h = x.T @ x
    return _search(
        w,
        x,
        steps,
        _mean_size,
        lambda w, s: quantized(w * s) / s,
        lambda d: ((d @ h) * d).sum(dtype=torch.float64),
    )


def token_by_token(w, x, quantized, steps):
    best = None
    for i in range(steps + 1):
        s = torch.stack([column.abs().mean() for column in x.T]).pow(i / steps)
        made = quantized(w * s[None, :]) / s[None, :]
        error = float((x @ made.T - x @ w.T).pow(2).mean())
        if best is None or error < best[0]:
            best = (error, s)
    return best[1]


def nearest(w, scale, h):
    return torch.round(w / scale)


def all_down(w, scale, h):
    return torch.floor(w / scale)


def all_up(w, scale, h):
    return torch.floor(w / scale) + 1


def _combinations(w, scale):
    low = torch.floor(w / scale)
    return [low + torch.tensor(c) for c in itertools.product((0.0, 1.0), repeat=len(w))]


def worst(w, scale, h):
    return max(_combinations(w, scale), key=lambda c: float((w - c * scale) @ h @ (w - c * scale)))


def diagonal_only(w, scale, h):
    return min(_combinations(w, scale), key=lambda c: float((h.diagonal() * (w - c * scale) ** 2).sum()))


def numbers(w, scale, h):
    return scale * by_key(w, scale, h)


def ups(w, scale, h):
    return by_key(w, scale, h) - torch.floor(w / scale)


def by_key(w, scale, h):
    return min(_combinations(w, scale), key=lambda c: float((w - c * scale) @ h @ (w - c * scale)))


def by_counting(w, scale, h):
    n, best = len(w), None
    for number in range(2**n):
        c = torch.floor(w / scale)
        for j in range(n):
            c[j] += (number >> j) & 1
        d = w - c * scale
        loss = (d[None] @ h @ d[:, None]).item()
        if best is None or loss < best[0]:
            best = (loss, c)
    return best[1].int()


def sign_lost(x, beta, p):
    return (x.abs() - x.abs() ** (p - 1) / beta).clamp(min=0)


def no_floor(x, beta, p):
    return torch.sign(x) * (x.abs() - x.abs() ** (p - 1) / beta)


def power_p(x, beta, p):
    return torch.sign(x) * (x.abs() - x.abs() ** p / beta).clamp(min=0)


def times_beta(x, beta, p):
    return torch.sign(x) * (x.abs() - x.abs() ** (p - 1) * beta).clamp(min=0)


def soft_threshold(x, beta, p):
    return torch.sign(x) * (x.abs() - 1 / beta).clamp(min=0)


def only_cut(x, beta, p):
    return torch.where(x.abs() > x.abs() ** (p - 1) / beta, x, 0.0)


def the_rest(x, beta, p):
    return x - with_relu(x, beta, p)


def with_relu(x, beta, p):
    return x.sign() * torch.relu(x.abs() - x.abs().pow(p - 1) / beta)


def one_by_one(x, beta, p):
    found = []
    for value in x.tolist():
        size = abs(value)
        left = max(size - size ** (p - 1) / beta, 0.0)
        found.append(left if value > 0 else -left)
    return torch.tensor(found)


def _double(h, corner):
    return torch.cat([torch.cat([h, h], 1), torch.cat([h, corner * h], 1)])


def not_divided(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = _double(h, -1)
    return h


def divided_by_n(n):
    return not_divided(n) / n


def corner_positive(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = _double(h, 1)
    return h / n**0.5


def the_identity(n):
    return torch.eye(n)


def with_kron(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return h / n**0.5


def by_parity(n):
    i = torch.arange(n)
    both = i[:, None] & i[None, :]
    ones = sum((both >> bit) & 1 for bit in range(8))
    return (1.0 - 2.0 * (ones % 2)).double() / n**0.5


WRONG = {
    "07.1": [
        (divides_first, "multiply, and divide afterwards"),
        (never_undone, "do not divide by s"),
        (compares_weights, "what counts is the output"),
        (largest_input, "not its largest"),
        (signed_mean, "cancel"),
        (root_mean_square, "root of its mean square"),
        (no_search, "never called"),
        (without_asking, "alpha = 0"),
        (always_the_same, "alpha = 0.4"),
        (per_row, "shape"),
    ],
    "07.2": [
        (nearest, "rounding to nearest"),
        (all_down, "rounded down"),
        (all_up, "rounded up"),
        (worst, "worst"),
        (diagonal_only, "with all of H"),
        (numbers, "these are the numbers"),
        (ups, "0 for down"),
    ],
    "07.3": [
        (sign_lost, "sign is lost"),
        (no_floor, "stop at 0"),
        (power_p, "power is p - 1"),
        (times_beta, "divided by beta"),
        (soft_threshold, "depends on |x|"),
        (only_cut, "only cut"),
        (the_rest, "return W_e"),
    ],
    "07.4": [
        (not_divided, "divide by the root"),
        (divided_by_n, "divide by n"),
        (corner_positive, "right angles"),
        (the_identity, "should have the size"),
    ],
}
RIGHT = {
    "07.1": [with_a_hessian, token_by_token],
    "07.2": [by_key, by_counting],
    "07.3": [with_relu, one_by_one],
    "07.4": [with_kron, by_parity],
}
