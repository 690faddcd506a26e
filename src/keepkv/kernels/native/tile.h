// Rows of keys or values in a few bits, or in 16 or 32, as the processor reads them: a tile of slots at a time.
//
// Slots are read in blocks of LANES words of 32 bits. A block holds R whole rows where these are short, or the k-th
// piece of one row of K. Word w of a block has J = 32 / bits numbers, the j-th in its bits j·bits and up: so one shift
// brings one number of every word to its place, whatever row it belongs to. What belongs to a row or to a group of
// its numbers (scale, zero, softmax share) is spread over the words of that row or group.
#pragma once
#include <algorithm>
#include <memory>

#include "lanes.h"

extern "C" {

// A field of the slots; what belongs to a slot lies beside that of the slot before.
struct Field {
    const void* data;               // null: there is none
    int64_t row, head, each, type;  // elements from row to row, from head to head, of a slot; type: see ``number``
};
// Keys or values. bits 2, 4, 8: codes, with scale, and with zero and levels or without; 9: codes of 8 bits with a sign;
// 16: float16, 17: bfloat16, 32: float32. The elements of ``rows`` are bytes.
struct Vectors {
    Field rows, scale, zero;
    const float* levels;
    int64_t width, bits;
};
}

namespace {

constexpr int TILE = 128;  // slots whose logits are held at once, while their rows are in the nearest cache
constexpr int HEADS = 4;   // query heads of a KV head that share the expansion of a row

inline float half(uint16_t x) {  // IEEE binary16
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff, bits;
    float f;
    if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x0400) bits = sign | ((rest << 13) + 0x38000000);
    else { f = (float)rest * 0x1p-24f; return sign ? -f : f; }
    std::memcpy(&f, &bits, 4);
    return f;
#endif
}
inline float brain(uint16_t x) {  // bfloat16
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// What the j-th numbers of a block are, by how rows are written.
template <int BITS> struct Uniform {
    static constexpr int J = 32 / BITS;
    static constexpr bool CODED = true;
    static F number(U x, int j, [[maybe_unused]] const float* table) {
#if defined(__AVX512F__)
        if constexpr (BITS <= 4) return look_up<(1 << BITS)>(table, x >> (BITS * j));
#endif
        return __builtin_convertvector((I)((x >> (BITS * j)) & ((1 << BITS) - 1)), F);
    }
};
struct Signed {
    static constexpr int J = 4;
    static constexpr bool CODED = true;
    static F number(U x, int j, const float*) { return __builtin_convertvector((I)(x << (24 - 8 * j)) >> 24, F); }
};
template <int BITS> struct Levels {
    static constexpr int J = 32 / BITS;
    static constexpr bool CODED = true;
    static F number(U x, int j, const float* table) { return look_up<(1 << BITS)>(table, x >> (BITS * j)); }
};
struct Half {
    static constexpr int J = 2;
    static constexpr bool CODED = false;
    static F number(U x, int j, const float*) {
#if defined(__AVX512F__)
        return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(x >> (16 * j))));
#elif defined(__AVX2__) && defined(__F16C__)
        const __m256i y = (__m256i)((x >> (16 * j)) & 0xffff);
        return (F)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
        F y;
        for (int w = 0; w < LANES; ++w) y[w] = half((uint16_t)(x[w] >> (16 * j)));
        return y;
#endif
    }
};
struct Brain {
    static constexpr int J = 2;
    static constexpr bool CODED = false;
    static F number(U x, int j, const float*) { return (F)(j ? x & 0xffff0000u : x << 16); }
};
struct Float {
    static constexpr int J = 1;
    static constexpr bool CODED = false;
    static F number(U x, int, const float*) { return (F)x; }
};

inline float number(const Field& f, int64_t i) {
    switch (f.type) {
        case 0: return ((const float*)f.data)[i];
        case 1: return half(((const uint16_t*)f.data)[i]);
        default: return brain(((const uint16_t*)f.data)[i]);
    }
}

template <class T> struct Buffer {  // zeros, on a line of the cache
    std::unique_ptr<char[]> held;
    T* at = nullptr;
    void resize(size_t n) {
        held.reset(new char[n * sizeof(T) + 64]());
        at = (T*)(((uintptr_t)held.get() + 63) & ~(uintptr_t)63);
    }
    T& operator[](size_t i) const { return at[i]; }
};

// How the rows of keys or of values fall into blocks, and where the words of a block find what belongs to them.
struct Shape {
    int width, J, bytes, R, K, G;  // numbers of a row, of a word; bytes of a row; R, K: see above; groups with a scale
    I row;                         // of each word
    Buffer<I> group;               // (K) of each word: row · G + group
    Buffer<int> at;                // (K,J,LANES) which number of the row; −1: none

    explicit Shape(const Vectors& v) {
        const int bits = v.bits == 17 ? 16 : v.bits == 9 ? 8 : (int)v.bits;
        width = (int)v.width, J = 32 / bits, bytes = (width * bits + 7) / 8;
        R = bytes % 4 == 0 && 4 * LANES % bytes == 0 ? 4 * LANES / bytes : 1;
        K = (bytes + 4 * LANES - 1) / (4 * LANES);
        G = v.scale.data ? (int)v.scale.each : 1;
        group.resize(K), at.resize(K * J * LANES);
        const int words = R > 1 ? LANES / R : K * LANES;  // of a row
        for (int k = 0; k < K; ++k)
            for (int w = 0; w < LANES; ++w) {
                const int word = (k * LANES + w) % words;
                row[w] = R > 1 ? w / words : 0;
                group[k][w] = row[w] * G + std::min(G - 1, word * J * G / width);
                for (int j = 0; j < J; ++j) at[(k * J + j) * LANES + w] = word * J + j < width ? word * J + j : -1;
            }
    }
    int blocks() const { return LANES / R; }  // of LANES slots
};

// Up to TILE slots of one segment: keys or values, their scales and zeros in float32. Those of empty slots are 0.
struct Tile {
    const Vectors& v;
    const Shape& s;
    const uint8_t* rows = nullptr;
    int slots = 0;
    Buffer<float> scale, zero, table;
    Buffer<uint8_t> tail;  // the last LANES slots, where there are fewer

    Tile(const Vectors& v, const Shape& s) : v(v), s(s) {
        if (v.scale.data) scale.resize(TILE * s.G + LANES);
        if (v.zero.data) zero.resize(TILE * s.G + LANES);
        tail.resize((size_t)LANES * s.bytes);
        table.resize(256);
        const int codes = v.bits <= 8 ? 1 << v.bits : 1;
        for (int i = 0; i < 256; ++i) table[i] = v.levels ? v.levels[i % codes] : (float)(i % codes);
    }
    // bias: of each slot, to find empty ones; null: none is.
    void move(int64_t row, int64_t head, int64_t slot, int n, const float* bias) {
        slots = n;
        rows = (const uint8_t*)v.rows.data + row * v.rows.row + head * v.rows.head + slot * s.bytes;
        if (const int rest = n % LANES) std::memcpy(tail.at, rows + (size_t)(n - rest) * s.bytes, (size_t)rest * s.bytes);
        read(v.scale, scale.at, row, head, slot, bias);
        read(v.zero, zero.at, row, head, slot, bias);
    }
    // Rows from the first of LANES slots.
    const uint8_t* from(int slot) const { return slot + LANES <= slots ? rows + (size_t)slot * s.bytes : tail.at; }
    // Has LANES slots of the tile that may follow brought near; an address where nothing lies does no harm.
    void ahead(int slot) const {
        const uint8_t* at = rows + (size_t)(slot + TILE) * s.bytes;
        for (int i = 0; i < LANES * s.bytes; i += 64) __builtin_prefetch(at + i);
    }
    // The k-th piece of a row, or several rows.
    U block(const uint8_t* from, int k) const {
        const int begin = k * 4 * LANES;
        if (s.R > 1 || begin + 4 * LANES <= s.bytes) return load<U>(from + begin);
        U x{};
        std::memcpy(&x, from + begin, s.bytes - begin);
        return x;
    }

  private:
    void read(const Field& f, float* to, int64_t row, int64_t head, int64_t slot, const float* bias) const {
        if (!f.data) return;
        const int64_t start = row * f.row + head * f.head + slot * s.G;
        const int n = slots * s.G;
        int i = 0;
#if defined(__AVX512F__)
        if (f.type == 1)
            for (const uint16_t* x = (const uint16_t*)f.data + start; i + LANES <= n; i += LANES)
                store(to + i, (F)_mm512_cvtph_ps(load<__m256i>(x + i)));
#endif
        for (; i < n; ++i) to[i] = number(f, start + i);
        std::fill(to + n, to + TILE * s.G, 0.0f);
        if (!bias) return;
        for (int k = 0; k < slots; ++k)
            if (bias[k] == NONE) std::fill(to + k * s.G, to + (k + 1) * s.G, 0.0f);
    }
};

typedef float Line[TILE + LANES];  // one number for each slot of a tile; what is behind is only read

// Products u (N) of N queries, q (K,J,N) and its sums over J, ``ones`` (K,N), with the keys of a tile.
template <class Kind, int N> struct Products {
    static void of(const Tile& t, const F* q, const F* ones, Line* u) {
        constexpr int M = Kind::CODED ? 2 : 1;
        const Shape& s = t.s;
        F whole[N] = {};  // of each query: the sum of its numbers, for zeros of whole rows
        for (int n = 0; n < N; ++n) {
            float sum = 0;
            for (int k = 0; k < s.K; ++k)
                for (int w = 0; w < LANES / s.R; ++w) sum += ones[k * N + n][w];
            whole[n] = all(sum);
        }
        for (int slot = 0; slot < t.slots; slot += LANES) {
            F parts[N][LANES];
            if (Kind::CODED) t.ahead(slot);
            if (s.blocks() < M) blocks<1>(t, slot, 0, q, ones, parts);
            for (int i = 0; i + M <= s.blocks(); i += M) blocks<M>(t, slot, i, q, ones, parts);
            for (int n = 0; n < N; ++n) {
                F x = fold(parts[n], s.blocks());
                if (Kind::CODED && s.G == 1) x *= load<F>(t.scale.at + slot);
                if (Kind::CODED && s.G == 1 && t.zero.at) x += load<F>(t.zero.at + slot) * whole[n];
                store(u[n] + slot, x);
            }
        }
    }
    // The i-th block of LANES slots and, for M = 2, the next, so that a query is loaded once for both.
    template <int M>
    __attribute__((always_inline)) static void blocks(const Tile& t, int slot, int i, const F* q, const F* ones, F (*parts)[LANES]) {
        constexpr int J = Kind::J;
        const Shape& s = t.s;
        const uint8_t* rows = t.from(slot) + (size_t)i * s.R * s.bytes;
        F sums[N][M] = {};
        for (int k = 0; k < s.K; ++k) {
            U x[M];
            F of[N][M] = {};
            for (int m = 0; m < M; ++m) x[m] = t.block(rows + (size_t)m * s.R * s.bytes, k);
#pragma GCC unroll 16
            for (int j = 0; j < J; ++j) {
                F number[M];
                for (int m = 0; m < M; ++m) number[m] = Kind::number(x[m], j, t.table.at);
                for (int n = 0; n < N; ++n)
                    for (int m = 0; m < M; ++m) of[n][m] += number[m] * q[(k * J + j) * N + n];
            }
            for (int m = 0; m < M; ++m) {
                if (!Kind::CODED || s.G == 1) {
                    for (int n = 0; n < N; ++n) sums[n][m] += of[n][m];
                    continue;
                }
                const size_t group = (size_t)(slot + (i + m) * s.R) * s.G;
                const F scale = spread(t.scale.at + group, s.group[k]);
                for (int n = 0; n < N; ++n) sums[n][m] += of[n][m] * scale;
                if (!t.zero.at) continue;
                const F zero = spread(t.zero.at + group, s.group[k]);
                for (int n = 0; n < N; ++n) sums[n][m] += zero * ones[k * N + n];
            }
        }
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < M; ++m) parts[n][i + m] = sums[n][m];
    }
};

// Adds the values of a tile times ``shares`` (N) to sums (K,N,J), and their zeros to ``zeros`` (K,N). Spoils the shares.
template <class Kind, int N> struct Means {
    static void of(const Tile& t, Line* shares, F* sums, F* zeros) {
        constexpr int J = Kind::J, FIT = SUMS / N, STEP = std::min(J, FIT >= 8 ? 8 : FIT >= 4 ? 4 : 2);
        const Shape& s = t.s;
        if (Kind::CODED && s.G == 1) whole(t, shares, zeros);
        for (int k = 0; k < s.K; ++k)
            for (int from = 0; from < J; from += STEP) {
                F of[N][STEP], shift[N] = {};
                F* const to = sums + (k * J + from) * N;
                for (int n = 0; n < N; ++n)
                    for (int j = 0; j < STEP; ++j) of[n][j] = to[j * N + n];
                for (int slot = 0; slot < t.slots; slot += LANES) {
                    const uint8_t* rows = t.from(slot);
                    if (Kind::CODED && from == 0 && k == 0) t.ahead(slot);
                    for (int i = slot; i < slot + LANES; i += s.R, rows += (size_t)s.R * s.bytes) {
                        const U x = t.block(rows, k) >> (from * (32 / J));
                        F share[N];
                        for (int n = 0; n < N; ++n) share[n] = spread(shares[n] + i, s.row);
                        if (Kind::CODED && s.G > 1) {
                            if (t.zero.at && from == 0) {
                                const F zero = spread(t.zero.at + (size_t)i * s.G, s.group[k]);
                                for (int n = 0; n < N; ++n) shift[n] += share[n] * zero;
                            }
                            const F scale = spread(t.scale.at + (size_t)i * s.G, s.group[k]);
                            for (int n = 0; n < N; ++n) share[n] *= scale;
                        }
#pragma GCC unroll 8
                        for (int j = 0; j < STEP; ++j) {
                            const F number = Kind::number(x, j, t.table.at);
                            for (int n = 0; n < N; ++n) of[n][j] += number * share[n];
                        }
                    }
                }
                for (int n = 0; n < N; ++n) {
                    zeros[k * N + n] += shift[n];
                    for (int j = 0; j < STEP; ++j) to[j * N + n] = of[n][j];
                }
            }
    }
    // Scales and zeros of whole rows: they meet the shares, not the numbers.
    static void whole(const Tile& t, Line* shares, F* zeros) {
        for (int n = 0; n < N; ++n) {
            F shift{};
            for (int slot = 0; slot < t.slots; slot += LANES) {
                const F share = load<F>(shares[n] + slot);
                if (t.zero.at) shift += share * load<F>(t.zero.at + slot);
                store(shares[n] + slot, share * load<F>(t.scale.at + slot));
            }
            float sum = 0;
            for (int w = 0; w < LANES; ++w) sum += shift[w];
            for (int k = 0; k < t.s.K; ++k) zeros[k * N + n] += all(sum / t.s.R);  // once for each row of a block
        }
    }
};

// Work<Kind, N>::of for the kind of ``v`` and n heads.
template <template <class, int> class Work, class Kind, class... A> void with_heads(int n, A... a) {
    switch (n) {
        case 1: return Work<Kind, 1>::of(a...);
        case 2: return Work<Kind, 2>::of(a...);
        case 3: return Work<Kind, 3>::of(a...);
        default: return Work<Kind, HEADS>::of(a...);
    }
}
template <template <class, int> class Work, class... A> void run(int n, const Tile& t, A... a) {
    switch (t.v.bits + (t.v.levels ? 100 : 0)) {
        case 2: return with_heads<Work, Uniform<2>, const Tile&>(n, t, a...);
        case 4: return with_heads<Work, Uniform<4>, const Tile&>(n, t, a...);
        case 8: return with_heads<Work, Uniform<8>, const Tile&>(n, t, a...);
        case 9: return with_heads<Work, Signed, const Tile&>(n, t, a...);
        case 102: return with_heads<Work, Levels<2>, const Tile&>(n, t, a...);
        case 104: return with_heads<Work, Levels<4>, const Tile&>(n, t, a...);
        case 108: return with_heads<Work, Levels<8>, const Tile&>(n, t, a...);
        case 16: return with_heads<Work, Half, const Tile&>(n, t, a...);
        case 17: return with_heads<Work, Brain, const Tile&>(n, t, a...);
        default: return with_heads<Work, Float, const Tile&>(n, t, a...);
    }
}

}  // namespace
