/* Register tiles of products of bf16 pairs, for processors that have their dot products but no tile unit.
 *
 * One side is read row by row, a pair broadcast at a time; the other is laid out in panels, [inputs / 2][outputs][2], so
 * that a vector holds one pair of inputs of 16 outputs.
 */
#ifndef TELL_TILES_H
#define TELL_TILES_H
#include "bits.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define TELL_TILES 1
#include <immintrin.h>
#include <omp.h>
#define LANES 16
#define PANEL 64
#define ROWS 6 /* x 4 vectors: 24 of the 32 registers hold sums */
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

static inline i64 even(i64 n) { return n + (n & 1); }
static inline i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }
static inline __mmask16 first(i64 n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* 16 rows of 16 pairs, transposed. */
INLINE void transpose(__m512i *r) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

/* A panel `wide` outputs wide, filled up with zeros, of inputs from .. to. Element (output o, input k) of the weight lies
   at w[o * stride + k], or at w[k * stride + o] where outputs are columns; to a pair of its own where inputs are odd. */
static void lay_out(const bf16 *w, i64 stride, int columns, i64 outputs, i64 inputs, i64 wide, bf16 *to) {
  for (i64 o = 0; o < wide; o += LANES) {
    i64 n = outputs - o < LANES ? outputs - o : LANES;
    if (columns) {
      __mmask16 mask = first(n);
      for (i64 k = 0; k < inputs; k += 2) {
        const bf16 *a = w + k * stride + o;
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k + 1 < inputs ? mask : 0, a + stride));
        _mm512_storeu_si512(to + k * wide + 2 * o, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    } else {
      for (i64 k = 0; k < inputs; k += 32) {
        i64 left = inputs - k;
        __mmask32 mask = left >= 32 ? 0xffffffff : (1u << left) - 1;
        __m512i r[16];
        UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi16(i < n ? mask : 0, w + (o + i) * stride + k);
        transpose(r);
        for (int i = 0; i < 16 && 2 * i < left; i++) _mm512_storeu_si512(to + (k + 2 * i) * wide + 2 * o, r[i]);
      }
    }
  }
}

/* s += x times a panel `width` vectors wide, of which `vectors` count. Input pair p of row i lies at
   x[i * row + p * step]. */
INLINE void multiply(int rows, int vectors, i64 width, const bf16 *x, i64 row, i64 step, i64 pairs, const bf16 *panel,
                     __m512 s[rows][vectors]) {
  for (i64 p = 0; p < pairs; p++) {
    __m512bh v[4];
    UNROLL for (int b = 0; b < vectors; b++) v[b] = (__m512bh)_mm512_loadu_si512(panel + (p * width + b) * 2 * LANES);
    UNROLL for (int i = 0; i < rows; i++) {
      __m512bh a = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + i * row + p * step));
      UNROLL for (int b = 0; b < vectors; b++) s[i][b] = _mm512_dpbf16_ps(s[i][b], a, v[b]);
    }
  }
}

INLINE void clear(int rows, int vectors, __m512 s[rows][vectors]) {
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int b = 0; b < vectors; b++) s[i][b] = _mm512_setzero_ps();
}

INLINE void load_sums(int rows, int vectors, __m512 s[rows][vectors], const float *from, i64 stride) {
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int b = 0; b < vectors; b++)
    s[i][b] = _mm512_loadu_ps(from + i * stride + b * LANES);
}

INLINE void store_sums(int rows, int vectors, __m512 s[rows][vectors], float *to, i64 stride) {
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int b = 0; b < vectors; b++)
    _mm512_storeu_ps(to + i * stride + b * LANES, s[i][b]);
}

INLINE void store(int rows, int vectors, __m512 s[rows][vectors], bf16 *y, i64 stride, i64 wide) {
  UNROLL for (int b = 0; b < vectors; b++) {
    __mmask16 mask = first(wide - b * LANES);
    UNROLL for (int i = 0; i < rows; i++)
      _mm256_mask_storeu_epi16(y + i * stride + b * LANES, mask, (__m256i)_mm512_cvtneps_pbh(s[i][b]));
  }
}
#endif
#endif
