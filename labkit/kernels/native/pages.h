// Keys and values as the cache keeps them: in pages of 16 tokens. Keys lie number by number, so that a vector register holds one
// number of all 16 tokens, since a query is multiplied by all of them; values lie token by token, since a token's are added up
// together. A format is a float, or codes with a scale for each token and group of its numbers:
//
//     number = scale * (code + offset),  offset = -zero point, or the lowest code where there is none
//
// where codes count from 0, a byte each, or half a byte: then numbers 2i and 2i + 1 share one, the first in its lower half.

#pragma once
#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

// Keys, or values, of all layers.
struct Kept {
    uint8_t* codes;                // (layers, heads, pages, numbers, 16), or (..., 16, stride)
    uint8_t* scale;                // (layers, heads, pages, groups, 16), or null: floats
    uint8_t* zero;                 // the same of bytes, or null: symmetric
    int64_t pages, width;          // width: how many numbers a group has
    int64_t stride;                // numbers from one token to the next, a multiple of 16; 0: they lie number by number
    int32_t format, scale_format;  // see with_format
    int32_t lowest, highest;       // of the codes as the grid has them
};

#if defined(__AVX512F__)
inline Floats floats_of_bytes(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
inline Floats load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
#else
inline Floats floats_of_bytes(__m128i x) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
inline __m256 load_bf16_half(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
#endif

// The formats. `load` gives number i of all 16 tokens of a page that lies number by number, `along` 16 numbers of one token of the
// others, from number i on. `put` writes number i, of which `at` says the place.

struct Float32 {
    static constexpr int BITS = 32;
    static constexpr bool CODES = false;
    static constexpr float LARGEST = std::numeric_limits<float>::max(), SMALLEST = 1.4e-45f;
    static Floats load(const uint8_t* p, long i) { return along(p, i * LANES); }
    static Floats along(const uint8_t* p, long i) { return ::load((const float*)p + i); }
    static float number(const uint8_t* p, long at) { return ((const float*)p)[at]; }
    static void put(uint8_t* p, long, long at, float x) { ((float*)p)[at] = x; }
};

struct Float16 {
    static constexpr int BITS = 16;
    static constexpr bool CODES = false;
    static constexpr float LARGEST = 65504, SMALLEST = 5.9604645e-8f;
    static Floats load(const uint8_t* p, long i) { return along(p, i * LANES); }
    static Floats along(const uint8_t* p, long i) { return ::load((const uint16_t*)p + i); }
    static float number(const uint8_t* p, long at) { return ::number(((const uint16_t*)p)[at]); }
    static void put(uint8_t* p, long, long at, float x) { ((uint16_t*)p)[at] = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
};

struct BFloat16 {
    static constexpr int BITS = 16;
    static constexpr bool CODES = false;
    static constexpr float LARGEST = 3.3895314e38f, SMALLEST = 9.1835496e-41f;
    static Floats load(const uint8_t* p, long i) { return along(p, i * LANES); }
    static Floats along(const uint8_t* p, long i) { return load_bf16((const uint16_t*)p + i); }
    static float number(const uint8_t* p, long at) {
        const uint32_t bits = uint32_t(((const uint16_t*)p)[at]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    static void put(uint8_t* p, long, long at, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        // What is no number stays none; others go to the nearest, halves to even.
        ((uint16_t*)p)[at] = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

struct Byte {
    static constexpr int BITS = 8;
    static constexpr bool CODES = true;
    static Floats load(const uint8_t* p, long i) { return along(p, i * LANES); }
    static Floats along(const uint8_t* p, long i) { return floats_of_bytes(_mm_loadu_si128((const __m128i*)(p + i))); }
    static void put(uint8_t* p, long, long at, int code) { p[at] = code; }
};

struct HalfByte {
    static constexpr int BITS = 4;
    static constexpr bool CODES = true;
    static Floats load(const uint8_t* p, long i) {
        const __m128i both = _mm_loadu_si128((const __m128i*)(p + i / 2 * LANES)), shift = _mm_cvtsi32_si128(4 * (i & 1));
        return floats_of_bytes(_mm_and_si128(_mm_srl_epi16(both, shift), _mm_set1_epi8(15)));
    }
    static Floats along(const uint8_t* p, long i) {
        const __m128i both = _mm_loadl_epi64((const __m128i*)(p + i / 2)), mask = _mm_set1_epi8(15);
        return floats_of_bytes(_mm_unpacklo_epi8(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask)));
    }
    static void put(uint8_t* p, long i, long at, int code) {  // the first of the two first
        p[at] = i & 1 ? p[at] | code << 4 : code;
    }
};

// Calls with(the format): float32, float16 and bfloat16 are 0 to 2, bytes and half bytes 3 and 4.
template <class With>
void with_float(int32_t format, With with) {
    if (format == 0) with(Float32());
    else if (format == 1) with(Float16());
    else with(BFloat16());
}

template <class With>
void with_format(int32_t format, With with) {
    if (format < 3) with_float(format, with);
    else if (format == 3) with(Byte());
    else with(HalfByte());
}

// The pages of one layer and head.
class Pages {
public:
    const long size;   // numbers of a token
    const long width;  // of a group

    Pages(const Kept& kept, long layer, long heads, long head, long size)
        : size(size), width(kept.width), kept_(kept), groups_((size + width - 1) / width),
          first_((layer * heads + head) * kept.pages) {}

    template <class Stored>
    uint8_t* codes(int32_t page) const {
        return kept_.codes + place(page) * bytes<Stored>();
    }
    Floats scale(int32_t page, long group) const {
        Floats found;
        with_float(kept_.scale_format, [&](auto stored) { found = stored.load(kept_.scale, place(page, group)); });
        return found;
    }
    Floats offset(int32_t page, long group) const {
        if (!kept_.zero) return all(kept_.lowest);
        return multiply(Byte::load(kept_.zero, place(page, group)), all(-1));
    }
    // How many pages ahead is to be asked for what is read soon.
    template <class Stored>
    long ahead() const {
        return std::max(1L, (12L << 10) / bytes<Stored>());
    }
    // Bytes from one token to the next of a page that lies token by token.
    template <class Stored>
    long row() const {
        return kept_.stride * Stored::BITS / 8;
    }

    // Asks for a page, and says how many bytes that are.
    long ask_for(int32_t page) const {
        long asked = 0;
        with_format(kept_.format, [&](auto stored) {
            using Stored = decltype(stored);
            for (; asked < bytes<Stored>(); asked += 64) fetch_for_later(codes<Stored>(page) + asked);
        });
        return asked;
    }

    // Write one token, x (size,), as the grid's fit and encode do in Python. Where those refuse a number that is none, or too large
    // for its scale, the group has no numbers.
    template <class Stored>
    void keep(int32_t page, long lane, const float* x) const {
        uint8_t* to = codes<Stored>(page);
        if constexpr (!Stored::CODES)
            for (long i = 0; i < size; i++) Stored::put(to, i, at<Stored>(i, lane), x[i]);
        else
            for (long first = 0, group = 0; first < size; first += width, group++) {
                const long end = std::min(size, first + width);
                float low = x[first], high = x[first], strange = 0;
                for (long i = first; i < end; i++)
                    low = std::min(low, x[i]), high = std::max(high, x[i]), strange += x[i] * 0;
                float scale = 0;
                with_float(kept_.scale_format, [&](auto stored) {
                    const long spot = place(page, group) * LANES + lane;
                    const float wanted = scale_of<decltype(stored)>(low, high);
                    stored.put(kept_.scale, 0, spot, wanted + strange);  // no number where one of them is none
                    scale = stored.number(kept_.scale, spot);
                    if (scale == 0 && wanted > 0) stored.put(kept_.scale, 0, spot, scale = stored.SMALLEST);
                });
                const float divisor = scale == 0 ? 1 : scale, least = kept_.lowest, most = kept_.highest;
                float zero = 0;
                if (kept_.zero) {
                    zero = std::min<double>(most, std::max<double>(least, std::nearbyint(-double(low) / divisor)));
                    kept_.zero[place(page, group) * LANES + lane] = zero;
                }
                for (long i = first; i < end; i++) {
                    const float code = std::nearbyint(x[i] / divisor) + zero;
                    Stored::put(to, i, at<Stored>(i, lane), int(std::min(most, std::max(least, code)) - least));
                }
            }
    }

private:
    const Kept& kept_;
    const long groups_, first_;

    long place(int32_t page) const { return first_ + page; }
    long place(int32_t page, long group) const { return place(page) * groups_ + group; }
    template <class Stored>
    long bytes() const {
        return (kept_.stride ? kept_.stride : size) * Stored::BITS / 8 * LANES;
    }
    // Where number i of a token stands in its page; a half byte says no more than its byte.
    template <class Stored>
    long at(long i, long lane) const {
        constexpr long SHARED = Stored::BITS == 4 ? 2 : 1;
        return kept_.stride ? (lane * kept_.stride + i) / SHARED : i / SHARED * LANES + lane;
    }

    // Grid.scale_for, in double as there.
    template <class Scale>
    float scale_of(double low, double high) const {
        const double largest = std::max(std::abs(low), std::abs(high));
        if (low == high && largest <= Scale::LARGEST) return largest;
        if (kept_.zero) return (std::max(high, 0.0) - std::min(low, 0.0)) / kept_.highest;
        return largest / ((kept_.highest - kept_.lowest) / 2.0);
    }
};

}  // namespace
