// Vectors of LANES words of 32 bits, as wide as the processor's own: what the kernels need of them, and nothing else.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 16;  // SUMS: how many vectors of sums stay in registers
#else
constexpr int LANES = 8, SUMS = 8;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

const float NONE = -std::numeric_limits<float>::infinity();

template <class V> V load(const void* from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void store(float* to, F x) { std::memcpy(to, &x, sizeof x); }
inline F all(float x) { return x - F{}; }

// from[at[w]] in every word w; at[w] < LANES.
inline F spread(const float* from, I at) {
#if defined(__AVX512F__)
    return (F)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(from));
#elif defined(__AVX2__)
    return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), (__m256i)at);
#else
    F x;
    for (int w = 0; w < LANES; ++w) x[w] = from[at[w]];
    return x;
#endif
}

// table[code[w]] in every word w, of the lowest bits of code: SIZE is a power of two, the table that of 256 with this
// period.
template <int SIZE> F look_up(const float* table, U code) {
#if defined(__AVX512F__)
    if constexpr (SIZE <= LANES) return (F)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table));
#endif
    code &= SIZE - 1;
#if defined(__AVX512F__)
    return (F)_mm512_i32gather_ps((__m512i)code, table, 4);
#elif defined(__AVX2__)
    if constexpr (SIZE <= LANES) return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)code);
    if constexpr (SIZE == 2 * LANES) {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)code);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + LANES), (__m256i)code);
        return (F)_mm256_blendv_ps(low, high, (__m256)(code << 28));
    }
    return (F)_mm256_i32gather_ps(table, (__m256i)code, 4);
#else
    F x;
    for (int w = 0; w < LANES; ++w) x[w] = table[code[w]];
    return x;
#endif
}

inline F select(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
inline F larger(F a, F b) { return select(a > b, a, b); }

// e^x within 2 units of the last place, NaN for NaN; 0 below −80, so that no product is a slow denormal.
inline F exponential(F x) {
    F bounded = select(x > all(-80.0f), x, all(-80.0f));
    bounded = select(bounded < all(88.0f), bounded, all(88.0f));
    I n = __builtin_convertvector(bounded * 1.44269504f + select(bounded > all(0), all(0.5f), all(-0.5f)), I);
    F whole = __builtin_convertvector(n, F);
    F r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    F y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= (F)((n + 127) << 23);
    y = select(x < all(-80.0f), all(0), y);
    return select(x == x, y, x);
}

template <int... W> F pairs(F a, F b, std::integer_sequence<int, W...>) {
    return __builtin_shufflevector(a, b, (2 * W)...) + __builtin_shufflevector(a, b, (2 * W + 1)...);
}
// Sums within N vectors: LANES sums, each of LANES / N … neighbours. N is a power of two.
template <int N> F fold(F* x) {
    if constexpr (N == 1) return x[0];
    else {
        for (int i = 0; i < N / 2; ++i) x[i] = pairs(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, LANES>());
        return fold<N / 2>(x);
    }
}
inline F fold(F* x, int n) {
    switch (n) {
        case 16: return fold<(LANES >= 16 ? 16 : 8)>(x);
        case 8: return fold<8>(x);
        case 4: return fold<4>(x);
        case 2: return fold<2>(x);
        default: return x[0];
    }
}

}  // namespace
