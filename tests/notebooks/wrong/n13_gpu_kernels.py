"""Notebook 13: kernels that are wrong in a known way, and honest variants."""

from labkit.course.interpreted import tl, triton


@triton.jit
def without_a_mask(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i) + tl.load(y + i)
    tl.store(z + i, total)


@triton.jit
def stores_without_a_mask(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(z + i, total)


@triton.jit
def every_program_the_first_block(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(z + i, total, mask=inside)


@triton.jit
def loads_the_first_block(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + tl.arange(0, BLOCK), mask=inside) + tl.load(y + tl.arange(0, BLOCK), mask=inside)
    tl.store(z + i, total, mask=inside)


@triton.jit
def x_twice(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(x + i, mask=inside)
    tl.store(z + i, total, mask=inside)


@triton.jit
def mask_below_the_end(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n - 1
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(z + i, total, mask=inside)


@triton.jit
def into_x(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(x + i, total, mask=inside)


@triton.jit
def highest_bits_first(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (28 - 4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def shifts_by_single_bits(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def keeps_what_is_above(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = word[:, None] >> (4 * e)[None, :]  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def codes_as_they_are(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, code * s, mask=inside)


@triton.jit
def scale_by_word(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + (j // GROUP)[:, None] + 0 * e[None, :], mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def scales_of_row_0(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def first_scale_of_the_row(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + 0 * k, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def words_unmasked(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


@triton.jit
def one_step(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, TILE, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def keeps_the_last_step(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums = tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def a_stays(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(
            a + m[:, None] * K + tl.arange(0, TILE)[None, :],
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def transposed(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + n[None, :] * N + m[:, None], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def no_mask_on_k(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def programs_swapped(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def codes_unshifted(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum(code * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def first_scale(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + 0 * start, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def scale_at_the_end(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums * s, mask=o < out)


@triton.jit
def scale_by_step(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(
            scale + o * groups + tl.minimum(start // K, groups - 1), mask=o < out, other=0.0
        )  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def x_stays(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + tl.arange(0, K), mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def last_step_stays(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums = s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def reversed_codes(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (7 - k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def outputs_unmasked(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


@triton.jit
def every_part_the_first_span(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = tl.minimum(span, columns)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def every_part_everything(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = columns
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def reads_into_the_next(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = columns
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = part * span + start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def forgets_the_end_of_the_row(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = (part + 1) * span
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = part * span + start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def one_place_for_all(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * span, columns)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = part * span + start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + o, total, mask=o < out)


@triton.jit
def keeps_the_last_of_a_part(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * span, columns)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = part * span + start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total = tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def largest_with_its_sign(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(numbers, axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def cuts_off(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, (numbers / divisor).to(tl.int8), mask=k < columns)


@triton.jit
def rounds_down(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor).to(tl.int8), mask=k < columns)


@triton.jit
def by_128(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 128
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def forgets_the_row(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def by_255(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 255
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def forgets_the_scale(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def padding_unmasked(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


@triton.jit
def max_not_subtracted(x, y, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=float("-inf"))
    weights = tl.exp(numbers)
    tl.store(y + place, weights / tl.sum(weights, axis=0), mask=inside)


@triton.jit
def zeros_for_padding(x, y, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=0.0)
    weights = tl.exp(numbers - tl.max(numbers, axis=0))
    tl.store(y + place, weights / tl.sum(weights, axis=0), mask=inside)


@triton.jit
def not_divided(x, y, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=float("-inf"))
    weights = tl.exp(numbers - tl.max(numbers, axis=0))
    tl.store(y + place, weights, mask=inside)


@triton.jit
def by_the_sum_of_x(x, y, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=float("-inf"))
    weights = tl.exp(numbers - tl.max(numbers, axis=0))
    tl.store(y + place, weights / tl.sum(tl.where(inside, numbers, 0.0), axis=0), mask=inside)


@triton.jit
def row_0_for_all(x, y, columns, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=float("-inf"))
    weights = tl.exp(numbers - tl.max(numbers, axis=0))
    tl.store(y + place, weights / tl.sum(weights, axis=0), mask=inside)


@triton.jit
def no_factor(q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def result_not_rescaled(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def total_not_rescaled(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def nothing_rescaled(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - above)
        result = result + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def padding_counts(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = scores
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def not_divided_by_total(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result)


@triton.jit
def scales_of_the_keys(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(k_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


@triton.jit
def max_unchanged(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
    tl.store(y + head * D + d, result / total)


@triton.jit
def add_by_where(x, y, z, n, BLOCK: tl.constexpr):
    start = BLOCK * tl.program_id(axis=0)
    x, y, z = x + start, y + start, z + start
    j = tl.arange(0, BLOCK)
    left = tl.load(x + j, mask=j < n - start, other=5.0)
    tl.store(z + j, left + tl.load(y + j, mask=j < n - start), mask=j < n - start)


@triton.jit
def dequantize_a_word_at_a_time(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    for n in range(WORDS):
        j = tl.program_id(1) * WORDS + n
        if j < columns // 8:
            word = tl.load(words + row * (columns // 8) + j)
            for e in range(8):
                k = 8 * j + e
                code = (word >> (4 * e)) & 0xF
                tl.store(
                    w + row * columns + k,
                    (code.to(tl.float32) - 8.0) * tl.load(scale + row * groups + k // GROUP),
                )


@triton.jit
def matmul_by_sums(a, b, c, M, N, K, TILE: tl.constexpr):
    m = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    n = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(K):
        sums += tl.load(a + m * K + k, mask=m < M, other=0.0) * tl.load(
            b + k * N + n, mask=n < N, other=0.0
        )
    tl.store(c + m * N + n, sums, mask=(m < M) & (n < N))


@triton.jit
def row_with_words_loaded_once(
    x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT, K), tl.float32)
    for start in range(0, columns, K):
        j = start // 8 + tl.arange(0, K // 8)
        fits = (o < out)[:, None] & (j < columns // 8)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + j[None, :], mask=fits, other=0)
        code = (word[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
        code = tl.reshape(code, (OUT, K))
        k = start + tl.arange(0, K)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)
        sums += (code - 8) * tl.load(x + k, mask=k < columns, other=0.0)[None, :] * s[:, None]
    tl.store(y + o, tl.sum(sums, axis=1), mask=o < out)


@triton.jit
def parts_column_by_column(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    total = tl.zeros((OUT,), tl.float32)
    for k in range(part * span, min((part + 1) * span, columns)):
        total += tl.load(weight + o * columns + k, mask=o < out, other=0.0) * tl.load(x + k)
    tl.store(sums + part * out + o, total, mask=o < out)


@triton.jit
def quantize_by_the_inverse(x, codes, scale, columns, BLOCK: tl.constexpr):
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    largest = tl.maximum(tl.max(numbers, axis=0), -tl.min(numbers, axis=0))
    inverse = tl.where(largest > 0, 127.0 / tl.maximum(largest, 1e-30), 0.0)
    rounded = numbers * inverse
    rounded = tl.where(rounded < 0, tl.ceil(rounded - 0.5), tl.floor(rounded + 0.5))
    tl.store(codes + row * columns + k, rounded.to(tl.int8), mask=k < columns)
    tl.store(scale + row, largest / 127.0)


@triton.jit
def softmax_by_exp2(x, y, columns, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + tl.program_id(0) * columns + k, mask=k < columns, other=0.0)
    numbers = tl.where(k < columns, numbers, -1e30) * 1.4426950408889634
    weights = tl.exp2(numbers - tl.max(numbers, axis=0))
    tl.store(y + tl.program_id(0) * columns + k, weights / tl.sum(weights, axis=0), mask=k < columns)


@triton.jit
def attend_token_by_token(
    q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d) * factor
    highest, total = -1e30, 0.0
    result = tl.zeros((D,), tl.float32)
    for t in range(tokens):
        token = head * tokens + t
        k = ((tl.load(keys + token * (D // 8) + d // 8) >> (4 * (d % 8))) & 15) - 8
        v = ((tl.load(values + token * (D // 8) + d // 8) >> (4 * (d % 8))) & 15) - 8
        score = tl.sum(query * k, axis=0) * tl.load(k_scale + token)
        above = tl.maximum(highest, score)
        result = result * tl.exp(highest - above) + tl.exp(score - above) * v * tl.load(v_scale + token)
        total = total * tl.exp(highest - above) + tl.exp(score - above)
        highest = above
    tl.store(y + head * D + d, result / total)


WRONG = {
    "13.1": [
        (without_a_mask, "Does the mask of tl.load leave them out"),
        (stores_without_a_mask, "Does the mask of tl.store leave them out"),
        (every_program_the_first_block, "Each program needs places of its own"),
        (loads_the_first_block, "lacks program_id(0) * BLOCK"),
        (x_twice, "x to itself"),
        (mask_below_the_end, "no program wrote z[63]"),
        (into_x, "which is an input"),
    ],
    "13.2": [
        (highest_bits_first, "wrong order"),
        (shifts_by_single_bits, "a code has four"),
        (keeps_what_is_above, "keep the lowest four bits"),
        (codes_as_they_are, "subtract 8"),
        (scale_by_word, "the wrong group"),
        (scales_of_row_0, "scales of row 0"),
        (first_scale_of_the_row, "first scale of the row"),
        (words_unmasked, "reads words"),
    ],
    "13.3": [
        (one_step, "first step alone"),
        (keeps_the_last_step, "last step alone"),
        (a_stays, "does not move on"),
        (transposed, "transposed"),
        (no_mask_on_k, "Does the mask"),
        (programs_swapped, "no program wrote c"),
    ],
    "13.4": [
        (codes_unshifted, "subtract 8"),
        (first_scale, "scale of the first group"),
        (scale_at_the_end, "last group multiplies"),
        (scale_by_step, "moves with the steps of K"),
        (x_stays, "x does not move on"),
        (last_step_stays, "last step alone"),
        (reversed_codes, "wrong order"),
        (outputs_unmasked, "reads words"),
    ],
    "13.5": [
        (every_part_the_first_span, "part p begins at p * span"),
        (every_part_everything, "adds all columns"),
        (reads_into_the_next, "reads beyond its span"),
        (forgets_the_end_of_the_row, "Does the mask of tl.load"),
        (one_place_for_all, "Each program needs places of its own"),
        (keeps_the_last_of_a_part, "last step alone"),
    ],
    "13.6": [
        (largest_with_its_sign, "largest absolute value"),
        (cuts_off, "cut the fraction off"),
        (rounds_down, "you round down"),
        (by_128, "you divide by 128"),
        (forgets_the_row, "your scale is"),
        (by_255, "you divide by 255"),
        (forgets_the_scale, "no program wrote scale"),
        (padding_unmasked, "Does the mask of tl.load"),
    ],
    "13.7": [
        (max_not_subtracted, "exp overflows"),
        (zeros_for_padding, "count in its sum"),
        (not_divided, "do not divide by the sum"),
        (by_the_sum_of_x, "by the sum of x"),
        (row_0_for_all, "Each program needs places of its own"),
    ],
    "13.8": [
        (no_factor, "factor D"),
        (result_not_rescaled, "result is not brought"),
        (total_not_rescaled, "total is not brought"),
        (nothing_rescaled, "neither result nor total"),
        (padding_counts, "score of 0"),
        (not_divided_by_total, "not divided by the sum"),
        (scales_of_the_keys, "scales of the keys"),
        (max_unchanged, "keep highest"),
    ],
}
RIGHT = {
    "13.1": [add_by_where],
    "13.2": [dequantize_a_word_at_a_time],
    "13.3": [matmul_by_sums],
    "13.4": [row_with_words_loaded_once],
    "13.5": [parts_column_by_column],
    "13.6": [quantize_by_the_inverse],
    "13.7": [softmax_by_exp2],
    "13.8": [attend_token_by_token],
}
