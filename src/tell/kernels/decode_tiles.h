/* The two products of attention, a tile of queries against one cache; included twice by decode.c.
 *
 * score: scores (m, CHUNK) of q (m, width) against blocks of LANES keys.
 * mix: out (m, width) += p (m, CHUNK) times values. */
#if defined(__AVX512BF16__) && PAIR == 2
#define PAIR_OF(p) (__m512bh) _mm512_set1_epi32(*(const int32_t *)(p))
static inline __attribute__((always_inline)) void score_tile(const T *q, int m, i64 width, const T *keys, int blocks,
                                                            float *scores) {
  __m512 sum[6][4];
  for (int i = 0; i < m; i++)
    for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_setzero_ps();
  for (i64 d = 0; d < width; d += 2) {
    __m512bh k[4];
    for (int b = 0; b < blocks; b++) k[b] = (__m512bh)_mm512_loadu_si512(keys + (b * width + d) * LANES);
    for (int i = 0; i < m; i++) {
      __m512bh x = PAIR_OF(q + i * width + d);
      for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_dpbf16_ps(sum[i][b], x, k[b]);
    }
  }
  for (int i = 0; i < m; i++)
    for (int b = 0; b < blocks; b++) _mm512_storeu_ps(scores + i * CHUNK + b * LANES, sum[i][b]);
}

static inline __attribute__((always_inline)) void mix_tile(const T *p, int m, i64 width, const T *values, i64 pairs,
                                                          int blocks, float *out) {
  __m512 sum[6][4];
  for (int i = 0; i < m; i++)
    for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_loadu_ps(out + i * width + b * LANES);
  for (i64 j = 0; j < pairs; j++) {
    __m512bh v[4];
    for (int b = 0; b < blocks; b++) v[b] = (__m512bh)_mm512_loadu_si512(values + (j * width + b * LANES) * 2);
    for (int i = 0; i < m; i++) {
      __m512bh x = PAIR_OF(p + i * CHUNK + 2 * j);
      for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_dpbf16_ps(sum[i][b], x, v[b]);
    }
  }
  for (int i = 0; i < m; i++)
    for (int b = 0; b < blocks; b++) _mm512_storeu_ps(out + i * width + b * LANES, sum[i][b]);
}

/* The register tile must be known when compiled: one case a size. */
#define ROWS_OF(f, m, b, ...) \
  switch (m) {                \
    case 1: f(1, b); break;   \
    case 2: f(2, b); break;   \
    case 3: f(3, b); break;   \
    case 4: f(4, b); break;   \
    case 5: f(5, b); break;   \
    default: f(6, b);         \
  }
#define SIZES(f, m, b)             \
  switch (b) {                     \
    case 1: ROWS_OF(f, m, 1) break; \
    case 2: ROWS_OF(f, m, 2) break; \
    case 3: ROWS_OF(f, m, 3) break; \
    default: ROWS_OF(f, m, 4)      \
  }

static void score_bf16(const T *q, i64 m, i64 width, const T *keys, i64 blocks, float *scores) {
  for (i64 b = 0; b < blocks; b += 4)
    for (i64 i = 0; i < m; i += 6) {
      i64 rows = m - i < 6 ? m - i : 6, wide = blocks - b < 4 ? blocks - b : 4;
#define CASE(r, w) score_tile(q + i * width, r, width, keys + b * width * LANES, w, scores + i * CHUNK + b * LANES)
      SIZES(CASE, rows, wide)
#undef CASE
    }
}

static void mix_bf16(const T *p, i64 m, i64 width, const T *values, i64 pairs, float *out) {
  for (i64 d = 0; d < width; d += 4 * LANES)
    for (i64 i = 0; i < m; i += 6) {
      i64 rows = m - i < 6 ? m - i : 6, wide = (width - d) / LANES < 4 ? (width - d) / LANES : 4;
#define CASE(r, w) mix_tile(p + i * CHUNK, r, width, values + d * 2, pairs, w, out + i * width + d)
      SIZES(CASE, rows, wide)
#undef CASE
    }
}
#else
static void NAME(score)(const T *q, i64 m, i64 width, const T *keys, i64 blocks, float *scores) {
  for (i64 b = 0; b < blocks; b++)
    for (i64 i = 0; i < m; i++) {
      float sum[LANES] = {0};
      for (i64 d = 0; d < width; d += PAIR) {
        const T *k = keys + (b * width + d) * LANES;
        float x = GET(q[i * width + d]), y = GET(q[i * width + d + PAIR - 1]);
#pragma omp simd
        for (int j = 0; j < LANES; j++) {
          sum[j] += x * GET(k[j * PAIR]);
          if (PAIR == 2) sum[j] += y * GET(k[j * PAIR + PAIR - 1]);
        }
      }
      memcpy(scores + i * CHUNK + b * LANES, sum, sizeof sum);
    }
}

static void NAME(mix)(const T *p, i64 m, i64 width, const T *values, i64 pairs, float *out) {
  for (i64 i = 0; i < m; i++)
    for (i64 j = 0; j < pairs; j++) {
      const T *v = values + j * width * PAIR;
      float x = GET(p[i * CHUNK + j * PAIR]), y = GET(p[i * CHUNK + j * PAIR + PAIR - 1]);
      float *to = out + i * width;
#pragma omp simd
      for (i64 d = 0; d < width; d++) {
        to[d] += x * GET(v[d * PAIR]);
        if (PAIR == 2) to[d] += y * GET(v[d * PAIR + PAIR - 1]);
      }
    }
}
#endif
