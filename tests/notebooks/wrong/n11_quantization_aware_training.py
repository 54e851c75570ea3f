"""Notebook 11: answers that are wrong in a known way, and honest variants."""

import torch
import torch.nn.functional as F


def no_gradient(x, scale, lowest, highest):
    return torch.round(x / scale).clamp(lowest, highest) * scale


def all_detached(x, scale, lowest, highest):
    return (torch.round(x / scale).clamp(lowest, highest) * scale).detach()


def passes_everywhere(x, scale, lowest, highest):
    return x + (torch.round(x / scale).clamp(lowest, highest) * scale - x).detach()


def gives_codes(x, scale, lowest, highest):
    c = (x / scale).clamp(lowest, highest)
    return c + (torch.round(c) - c).detach()


def never_clamps(x, scale, lowest, highest):
    return x + (torch.round(x / scale) * scale - x).detach()


def only_clamps(x, scale, lowest, highest):
    return x.clamp(lowest * scale, highest * scale)


def gradient_by_scale(x, scale, lowest, highest):
    c = x.clamp(lowest * scale, highest * scale)
    q = torch.round(c / scale) * scale
    return scale * c + (q - scale * c).detach()


def gradient_over_scale(x, scale, lowest, highest):
    c = x.clamp(lowest * scale, highest * scale)
    q = torch.round(c / scale) * scale
    return c / scale + (q - c / scale).detach()


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def with_a_function(x, scale, lowest, highest):
    return _Round.apply((x / scale).clamp(lowest, highest)) * scale


def with_a_hook(x, scale, lowest, highest):
    steps = x / scale
    inside = ((steps > lowest) & (steps < highest)).float()
    q = torch.round(steps).clamp(lowest, highest) * scale
    return q.detach() + inside * (x - x.detach())


def inside_everywhere(v, s, q_n, q_p):
    return torch.round(v / s) - v / s


def zero_beyond(v, s, q_n, q_p):
    x = v / s
    return torch.where((x > -q_n) & (x < q_p), torch.round(x) - x, 0.0)


def only_the_code(v, s, q_n, q_p):
    return torch.round(v / s).clamp(-q_n, q_p)


def wrong_sign_inside(v, s, q_n, q_p):
    x = v / s
    return torch.where(x <= -q_n, -q_n, torch.where(x >= q_p, q_p, x - torch.round(x)))


def wrong_signs(v, s, q_n, q_p):
    x = v / s
    return torch.where(x <= -q_n, q_n, torch.where(x >= q_p, -q_p, x - torch.round(x)))


def lower_end_positive(v, s, q_n, q_p):
    x = v / s
    return torch.where(x <= -q_n, q_n, torch.where(x >= q_p, q_p, torch.round(x) - x))


def in_units_of_v(v, s, q_n, q_p):
    x = v / s
    return torch.where(x <= -q_n, -q_n, torch.where(x >= q_p, q_p, torch.round(x) * s - v))


def by_autograd(v, s, q_n, q_p):
    s = torch.full_like(v, s, requires_grad=True)
    c = (v / s).clamp(-q_n, q_p)
    out = (c + (torch.round(c) - c).detach()) * s
    return torch.autograd.grad(out.sum(), s)[0]


def looped_gradient(v, s, q_n, q_p):
    def one(x):
        return float(-q_n if x <= -q_n else q_p if x >= q_p else round(x) - x)

    return torch.tensor([one(x / s) for x in v.tolist()])


def other_direction(teacher, student):
    return F.kl_div(
        teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def summed(teacher, student):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")


def mean_over_words(teacher, student):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="mean")


def squared_logits(teacher, student):
    return (teacher - student).square().mean()


def cross_entropy(teacher, student):
    return F.cross_entropy(student, teacher.softmax(-1))


def a_plain_number(teacher, student):
    return torch_kl(teacher, student).item()


def torch_kl(teacher, student):
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def entropy_subtracted(teacher, student):
    p = teacher.softmax(-1)
    return F.cross_entropy(student, p) - F.cross_entropy(teacher, p)


def one_token_at_a_time(teacher, student):
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        total = total + (p * (p / q).log()).sum()
    return total / len(teacher)


WRONG = {
    "11.1": [
        (no_gradient, "0 everywhere"),
        (all_detached, "no gradient flows"),
        (passes_everywhere, "outside the range"),
        (gives_codes, "these are codes"),
        (never_clamps, "do not clamp"),
        (only_clamps, "do not round"),
        (gradient_by_scale, "is scaled"),
        (gradient_over_scale, "divided by the scale"),
    ],
    "11.2": [
        (inside_everywhere, "beyond the range"),
        (zero_beyond, "it does move"),
        (only_the_code, "forgot - v/s"),
        (wrong_sign_inside, "sign is the wrong way round"),
        (wrong_signs, "signs are the wrong way round"),
        (lower_end_positive, "the lower end"),
        (in_units_of_v, "units of v"),
    ],
    "11.3": [
        (other_direction, "other way round"),
        (summed, "sum over the tokens"),
        (mean_over_words, "mean over the words"),
        (squared_logits, "squared difference"),
        (cross_entropy, "cross-entropy"),
        (a_plain_number, "no gradient flows"),
    ],
}
RIGHT = {
    "11.1": [with_a_function, with_a_hook],
    "11.2": [by_autograd, looped_gradient],
    "11.3": [torch_kl, entropy_subtracted, one_token_at_a_time],
}
