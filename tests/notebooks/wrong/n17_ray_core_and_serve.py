"""Notebook 17: answers that are wrong in a known way, and honest variants."""

import json
import math

from labkit.quant import QuantSpec, encode, fit, mse, rtn, sqnr_db


def forgets_the_scales(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return QuantSpec.parse(spec).bits, sqnr_db(weight, quantized)


def counts_bytes(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return quantized.nbytes / weight.numel(), sqnr_db(weight, quantized)


def returns_the_mse(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return quantized.bits_per_weight, mse(weight, quantized)


def compares_with_codes(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return quantized.bits_per_weight, sqnr_db(weight, quantized.codes.float())


def ignores_the_spec(weight, spec):
    quantized = rtn(weight, QuantSpec.parse("int4 g64"))
    return quantized.bits_per_weight, sqnr_db(weight, quantized)


def error_first(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return sqnr_db(weight, quantized), quantized.bits_per_weight


def only_the_error(weight, spec):
    return sqnr_db(weight, rtn(weight, QuantSpec.parse(spec)))


def by_hand(weight, spec):
    parsed = QuantSpec.parse(spec)
    quantized = encode(weight, parsed, fit(weight, parsed))
    w, q = weight.double(), quantized.dequantize().double()
    sqnr = 10 * math.log10(float((w * w).sum() / ((w - q) ** 2).sum()))
    return 8 * quantized.nbytes / weight.numel(), sqnr


def as_a_list(weight, spec):
    quantized = rtn(weight, QuantSpec.parse(spec))
    return [quantized.pack().nbytes * 8 / weight.numel(), sqnr_db(weight, quantized)]


def _chunks(lines):
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def reads_done_as_json(lines):
    text = ""
    for line in lines:
        if line.startswith("data: "):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def expects_a_choice(lines):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in _chunks(lines))


def expects_content(lines):
    return "".join(c["delta"]["content"] for chunk in _chunks(lines) for c in chunk["choices"])


def joins_with_blanks(lines):
    return " ".join(c["delta"].get("content", "") for chunk in _chunks(lines) for c in chunk["choices"])


def strips(lines):
    return "".join(
        c["delta"].get("content", "").strip() for chunk in _chunks(lines) for c in chunk["choices"]
    )


def stops_at_the_empty_line(lines):
    lines = list(lines)
    return reads_right(lines[: lines.index("")])


def keeps_the_last(lines):
    text = ""
    for chunk in _chunks(lines):
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or text
    return text


def takes_every_line(lines):
    return "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines)


def reads_right(lines):
    return "".join(c["delta"].get("content", "") for chunk in _chunks(lines) for c in chunk["choices"])


def reads_one_joined_text(lines):
    events = "\n".join(lines).split("\n\n")
    found = []
    for event in events:
        data = [line[6:] for line in event.split("\n") if line.startswith("data: ")]
        for one in data:
            if one.strip() == "[DONE]":
                return "".join(found)
            found += [(c.get("delta") or {}).get("content") or "" for c in json.loads(one)["choices"]]
    return "".join(found)


def takes_the_larger(cores, memory_mb, threads, replica_mb, reserved_mb):
    return max(cores // threads, (memory_mb - reserved_mb) // replica_mb)


def forgets_the_reserve(cores, memory_mb, threads, replica_mb, reserved_mb):
    return max(0, min(cores // threads, memory_mb // replica_mb))


def rounds_up(cores, memory_mb, threads, replica_mb, reserved_mb):
    return max(0, min(math.ceil(cores / threads), math.ceil((memory_mb - reserved_mb) / replica_mb)))


def may_be_negative(cores, memory_mb, threads, replica_mb, reserved_mb):
    return min(cores // threads, (memory_mb - reserved_mb) // replica_mb)


def cores_only(cores, memory_mb, threads, replica_mb, reserved_mb):
    return cores // threads


def at_least_one(cores, memory_mb, threads, replica_mb, reserved_mb):
    return max(1, min(cores // threads, (memory_mb - reserved_mb) // replica_mb))


def keeps_the_fraction(cores, memory_mb, threads, replica_mb, reserved_mb):
    return min(cores / threads, (memory_mb - reserved_mb) / replica_mb)


def counted_one_by_one(cores, memory_mb, threads, replica_mb, reserved_mb):
    count, memory_mb = 0, memory_mb - reserved_mb
    while cores >= threads and memory_mb >= replica_mb:
        count, cores, memory_mb = count + 1, cores - threads, memory_mb - replica_mb
    return count


WRONG = {
    "17.1": [
        (forgets_the_scales, "forget the scales"),
        (counts_bytes, "eight bits"),
        (returns_the_mse, "mean squared error"),
        (compares_with_codes, "dequantized"),
        (ignores_the_spec, "depend on spec"),
        (error_first, "wrong order"),
        (only_the_error, "two things"),
    ],
    "17.2": [
        (reads_done_as_json, "[DONE]"),
        (expects_a_choice, "empty list of choices"),
        (expects_content, "'content'"),
        (joins_with_blanks, "blanks between"),
        (strips, "strip"),
        (stops_at_the_empty_line, "first piece only"),
        (keeps_the_last, "last piece only"),
        (takes_every_line, "skip them"),
    ],
    "17.3": [
        (takes_the_larger, "scarcer"),
        (forgets_the_reserve, "reserved"),
        (rounds_up, "round up"),
        (may_be_negative, "negative"),
        (cores_only, "scarcer"),
        (at_least_one, "none fits"),
        (keeps_the_fraction, "fraction"),
    ],
}
RIGHT = {
    "17.1": [by_hand, as_a_list],
    "17.2": [reads_right, reads_one_joined_text],
    "17.3": [counted_one_by_one],
}
