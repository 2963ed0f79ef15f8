/* Products of few rows with bf16 weights, where the processor has dot products of bf16 pairs but no tile unit.
 *
 * A library's product costs some 25 us beside its arithmetic, and wants many rows; decoding multiplies 1 to 128 rows
 * by small matrices, 120 times a token. Weights are laid out as [outputs / 64][inputs / 2][64][2]: a vector holds one
 * pair of inputs of 16 outputs.
 */
#include "bits.h"
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#include <omp.h>
#define PANEL 64
#define ROWS 6   /* x 4 vectors: 24 of the 32 registers hold sums */
#define SHARE 48 /* rows of one job, so that a matrix of few panels feeds several threads */

int64_t decode_product_panel(void) { return PANEL; }

/* packed of weight (outputs, inputs); the last panel is filled up with zeros. */
void decode_pack(i64 outputs, i64 inputs, const bf16 *weight, bf16 *packed) {
#pragma omp parallel for schedule(static)
  for (i64 p = 0; p < (outputs + PANEL - 1) / PANEL; p++)
    for (i64 i = 0; i < inputs; i += 2) {
      bf16 *to = packed + (p * inputs + i) * PANEL;
      for (i64 o = 0; o < PANEL; o++) {
        int real = p * PANEL + o < outputs;
        const bf16 *from = weight + (p * PANEL + o) * inputs + i;
        to[2 * o] = real ? from[0] : 0;
        to[2 * o + 1] = real ? from[1] : 0;
      }
    }
}

static inline __attribute__((always_inline)) void tile(int rows, i64 inputs, const bf16 *x, const bf16 *w,
                                                      const float *bias, bf16 *y, i64 outputs, i64 wide,
                                                      const char *ahead) {
  __m512 sum[ROWS][4];
  for (int i = 0; i < rows; i++)
    for (int b = 0; b < 4; b++) sum[i][b] = _mm512_setzero_ps();
  for (i64 k = 0; k < inputs; k += 2) {
    __m512bh v[4];
    if (ahead) _mm_prefetch(ahead + k * PANEL * 2, _MM_HINT_T1);
    for (int b = 0; b < 4; b++) v[b] = (__m512bh)_mm512_loadu_si512(w + k * PANEL + b * 32);
    for (int i = 0; i < rows; i++) {
      __m512bh a = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + i * inputs + k));
      for (int b = 0; b < 4; b++) sum[i][b] = _mm512_dpbf16_ps(sum[i][b], a, v[b]);
    }
  }
  for (int b = 0; b < 4; b++) {
    i64 left = wide - b * 16;
    if (left <= 0) break;
    __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
    __m512 extra = bias ? _mm512_maskz_loadu_ps(mask, bias + b * 16) : _mm512_setzero_ps();
    for (int i = 0; i < rows; i++)
      _mm256_mask_storeu_epi16(y + i * outputs + b * 16, mask,
                               (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sum[i][b], extra)));
  }
}

/* y (n, outputs) = x (n, inputs) W^T + bias (outputs, fp32, or NULL); inputs even. */
void decode_product(i64 n, i64 inputs, i64 outputs, const bf16 *x, const bf16 *packed, const float *bias, bf16 *y) {
  const i64 panels = (outputs + PANEL - 1) / PANEL, shares = (n + SHARE - 1) / SHARE;
  const i64 threads = omp_get_max_threads();
  const i64 part = (n + shares - 1) / shares;
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 job = 0; job < panels * shares; job++) {
    const i64 p = job / shares, from = job % shares * part, to = from + part < n ? from + part : n;
    const bf16 *w = packed + p * PANEL * inputs;
    const float *add = bias ? bias + p * PANEL : NULL;
    const i64 wide = outputs - p * PANEL < PANEL ? outputs - p * PANEL : PANEL;
    for (i64 r = from; r < to; r += ROWS) {
      const bf16 *a = x + r * inputs;
      bf16 *c = y + r * outputs + p * PANEL;
      const i64 line = (r - from) / ROWS; /* each block of rows fetches a quarter of the panel likely to be next */
      const bf16 *after = w + threads * PANEL * inputs + line * 32;
      const char *next = line < 4 && p + threads < panels ? (const char *)after : NULL;
      switch (to - r) {
        case 1: tile(1, inputs, a, w, add, c, outputs, wide, next); break;
        case 2: tile(2, inputs, a, w, add, c, outputs, wide, next); break;
        case 3: tile(3, inputs, a, w, add, c, outputs, wide, next); break;
        case 4: tile(4, inputs, a, w, add, c, outputs, wide, next); break;
        case 5: tile(5, inputs, a, w, add, c, outputs, wide, next); break;
        default: tile(6, inputs, a, w, add, c, outputs, wide, next);
      }
    }
  }
}
#else
int64_t decode_product_panel(void) { return 0; } /* leave products to the library */
void decode_pack(i64 outputs, i64 inputs, const bf16 *weight, bf16 *packed) {}
void decode_product(i64 n, i64 inputs, i64 outputs, const bf16 *x, const bf16 *packed, const float *bias, bf16 *y) {}
#endif
