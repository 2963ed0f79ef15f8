/* Products of many rows with frozen bf16 weights and a low-rank adapter beside them, and the adapter's gradients, where
 * the processor has dot products of bf16 pairs but no tile unit.
 *
 * A library lays the weight out anew at each call, and the thin products of an adapter, bound by memory, cost it as much
 * as a fifth of the large one. Here a block of rows stays in the second-level cache while it is multiplied by both.
 * Weights are laid out in panels of 64 outputs, [inputs / 2][64][2]: a vector holds one pair of inputs of 16 outputs.
 */
#include "bits.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#include <omp.h>
#define LANES 16
#define PANEL 64
#define ROWS 6         /* x 4 vectors: 24 of the 32 registers hold sums */
#define THIN_ROWS 12   /* x 1 or 2 vectors, for the adapter's few columns */
#define BLOCK 240      /* rows of one job */
#define DEPTH 1536     /* inputs at a time: a panel of them stays in the second-level cache */
#define GROUP (1 << 21) /* numbers of the weight that are laid out at a time */
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

int64_t train_product_rows(void) { return THIN_ROWS; }

static inline i64 even(i64 n) { return n + (n & 1); }
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

/* s += x (rows, inputs) times a panel of `vectors` vectors. */
INLINE void multiply(int rows, int vectors, const bf16 *x, i64 stride, i64 inputs, const bf16 *panel,
                     __m512 s[rows][vectors]) {
  for (i64 k = 0; k < inputs; k += 2) {
    __m512bh v[4];
    UNROLL for (int b = 0; b < vectors; b++) v[b] = (__m512bh)_mm512_loadu_si512(panel + (k * vectors + 2 * b) * LANES);
    UNROLL for (int i = 0; i < rows; i++) {
      __m512bh a = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + i * stride + k));
      UNROLL for (int b = 0; b < vectors; b++) s[i][b] = _mm512_dpbf16_ps(s[i][b], a, v[b]);
    }
  }
}

INLINE void store(int rows, int vectors, __m512 s[rows][vectors], bf16 *y, i64 stride, i64 wide) {
  UNROLL for (int b = 0; b < vectors; b++) {
    __mmask16 mask = first(wide - b * LANES);
    UNROLL for (int i = 0; i < rows; i++)
      _mm256_mask_storeu_epi16(y + i * stride + b * LANES, mask, (__m256i)_mm512_cvtneps_pbh(s[i][b]));
  }
}

typedef struct {
  i64 tokens, outputs, inputs, rank; /* inputs even */
  const bf16 *x;
  i64 x_stride;
  const bf16 *weight;
  i64 weight_stride;
  const bf16 *bias;  /* (outputs) or NULL */
  const bf16 *into;  /* inputs to ranks, or NULL: `inner` is given */
  i64 into_stride;
  const bf16 *out_of; /* ranks to outputs */
  i64 out_of_stride;
  i64 columns; /* outputs are columns of all three: y = x W; otherwise rows: y = x W^T */
  bf16 *inner; /* (tokens, rank rounded up to even) or NULL */
  bf16 *y;
  i64 y_stride;
} train_product_task;

INLINE void wide_tile(const train_product_task *t, i64 row, i64 column, i64 from, i64 depth, const bf16 *panel,
                      const bf16 *extra, float *sums) {
  __m512 s[ROWS][4];
  i64 wide = t->outputs - column;
  if (from) {
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int b = 0; b < 4; b++)
      s[i][b] = _mm512_loadu_ps(sums + i * PANEL + b * LANES);
  } else {
    UNROLL for (int b = 0; b < 4; b++) {
      __m512i bias = _mm512_setzero_si512();
      if (t->bias)
        bias = _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(wide - b * LANES), t->bias + column + b * LANES)), 16);
      UNROLL for (int i = 0; i < ROWS; i++) s[i][b] = (__m512)bias;
    }
  }
  multiply(ROWS, 4, t->x + row * t->x_stride + from, t->x_stride, depth, panel, s);
  if (from + depth < t->inputs) {
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int b = 0; b < 4; b++)
      _mm512_storeu_ps(sums + i * PANEL + b * LANES, s[i][b]);
    return;
  }
  if (t->inner) multiply(ROWS, 4, t->inner + row * even(t->rank), even(t->rank), even(t->rank), extra, s);
  store(ROWS, 4, s, t->y + row * t->y_stride + column, t->y_stride, wide);
}

INLINE void thin_tile(int vectors, const train_product_task *t, i64 row, i64 column, const bf16 *panel) {
  __m512 s[THIN_ROWS][vectors];
  UNROLL for (int i = 0; i < THIN_ROWS; i++) UNROLL for (int b = 0; b < vectors; b++) s[i][b] = _mm512_setzero_ps();
  multiply(THIN_ROWS, vectors, t->x + row * t->x_stride, t->x_stride, t->inputs, panel, s);
  i64 width = even(t->rank);
  store(THIN_ROWS, vectors, s, t->inner + row * width + column, width, width - column);
}

/* Ranks of the panel of `into` that begins at a rank: two vectors, or one where that is enough. */
static inline i64 thin_width(i64 rank, i64 at) { return rank - at > LANES ? 2 * LANES : LANES; }

/* y = x weight + bias + inner out_of, with inner = x into where that is given, for the rows from .. to and the panels
   that are laid out; `sums` has room for BLOCK x PANEL. */
static void rows_of(const train_product_task *t, i64 from, i64 to, i64 column, i64 end, const bf16 *panels,
                    const bf16 *into, const bf16 *out_of, float *sums) {
  if (into)
    for (i64 c = 0; c < t->rank; c += 2 * LANES)
      for (i64 r = from; r < to; r += THIN_ROWS) {
        i64 row = r + THIN_ROWS <= to ? r : to - THIN_ROWS; /* the last tile overlaps the one before */
        if (thin_width(t->rank, c) == LANES)
          thin_tile(1, t, row, c, into + c * t->inputs);
        else
          thin_tile(2, t, row, c, into + c * t->inputs);
      }
  const i64 parts = (t->inputs + DEPTH - 1) / DEPTH, step = even((t->inputs + parts - 1) / parts);
  for (i64 c = column; c < end; c += PANEL) {
    const bf16 *panel = panels + (c - column) * t->inputs;
    for (i64 k = 0; k < t->inputs; k += step) {
      i64 depth = t->inputs - k < step ? t->inputs - k : step;
      for (i64 r = from; r < to; r += ROWS) {
        i64 row = r + ROWS <= to ? r : to - ROWS;
        wide_tile(t, row, c, k, depth, panel + k * PANEL, out_of + c * even(t->rank), sums + (r - from) * PANEL);
      }
    }
  }
}

void train_product(const train_product_task *t) {
  const i64 k = t->inputs, threads = omp_get_max_threads(), ranks = even(t->rank);
  const i64 all = (t->outputs + PANEL - 1) / PANEL;
  i64 group = GROUP / (PANEL * k) > 1 ? GROUP / (PANEL * k) : 1;
  if (group > all) group = all;
  /* as many blocks for each thread, and none under a tile */
  i64 blocks = (t->tokens + BLOCK * threads - 1) / (BLOCK * threads) * threads;
  if (blocks > t->tokens / THIN_ROWS) blocks = t->tokens / THIN_ROWS;
  bf16 *panels = aligned_alloc(64, (group * PANEL * k + all * PANEL * ranks + (ranks + 32) * k) * sizeof(bf16) + 64);
  bf16 *out_of = panels + group * PANEL * k, *into = out_of + all * PANEL * ranks;
#pragma omp parallel
  {
    float *sums = k > DEPTH ? aligned_alloc(64, (BLOCK + ROWS) * PANEL * sizeof(float)) : NULL;
    if (t->inner) {
#pragma omp for schedule(static) nowait
      for (i64 p = 0; p < all; p++)
        lay_out(t->out_of + p * PANEL * (t->columns ? 1 : t->out_of_stride), t->out_of_stride, t->columns,
                t->outputs - p * PANEL, t->rank, PANEL, out_of + p * PANEL * ranks);
    }
    if (t->into) {
#pragma omp for schedule(static) nowait
      for (i64 c = 0; c < t->rank; c += 2 * LANES)
        lay_out(t->into + c * (t->columns ? 1 : t->into_stride), t->into_stride, t->columns, t->rank - c, k,
                thin_width(t->rank, c), into + c * k);
    }
    for (i64 g = 0; g < all; g += group) {
      i64 end = g + group < all ? g + group : all;
#pragma omp for schedule(dynamic, 1)
      for (i64 p = g; p < end; p++)
        lay_out(t->weight + p * PANEL * (t->columns ? 1 : t->weight_stride), t->weight_stride, t->columns,
                t->outputs - p * PANEL, k, PANEL, panels + (p - g) * PANEL * k);
#pragma omp for schedule(dynamic, 1)
      for (i64 b = 0; b < blocks; b++)
        rows_of(t, t->tokens * b / blocks, t->tokens * (b + 1) / blocks, g * PANEL, end * PANEL, panels,
                t->into && !g ? into : NULL, out_of, sums);
    }
    free(sums);
  }
  free(panels);
}

#define PAIRS 64 /* of tokens: what they multiply stays in the second-level cache */
#define RANKS 8  /* x 2 vectors of columns: 16 sums */

/* sums (RANKS, 32 columns, rows `stride` apart) += g^T x over pairs of tokens; odd: the last has one. */
static void outer_tile(const int32_t *g, i64 g_stride, const bf16 *x, i64 x_stride, i64 pairs, int odd, __mmask32 mask,
                       float *sums, i64 stride) {
  static const uint16_t order[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512 s[RANKS][2];
  UNROLL for (int i = 0; i < RANKS; i++) UNROLL for (int b = 0; b < 2; b++)
    s[i][b] = _mm512_loadu_ps(sums + i * stride + b * LANES);
  for (i64 p = 0; p < pairs; p++) {
    const bf16 *row = x + 2 * p * x_stride;
    __m512i a = _mm512_maskz_loadu_epi16(mask, row);
    __m512i b = _mm512_maskz_loadu_epi16(odd && p == pairs - 1 ? 0 : mask, row + x_stride);
    _mm_prefetch((const char *)(row + 16 * x_stride), _MM_HINT_T0);
    _mm_prefetch((const char *)(row + 17 * x_stride), _MM_HINT_T0);
    __m512bh v = (__m512bh)_mm512_permutex2var_epi16(a, low, b), w = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
    UNROLL for (int i = 0; i < RANKS; i++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(g[p * g_stride + i]);
      s[i][0] = _mm512_dpbf16_ps(s[i][0], pair, v);
      s[i][1] = _mm512_dpbf16_ps(s[i][1], pair, w);
    }
  }
  UNROLL for (int i = 0; i < RANKS; i++) UNROLL for (int b = 0; b < 2; b++)
    _mm512_storeu_ps(sums + i * stride + b * LANES, s[i][b]);
}

/* out (rank, columns), or (columns, rank) where it is to be transposed, = scale g^T x for g (tokens, rank), x (tokens,
   columns). */
void train_outer(i64 tokens, i64 rank, i64 columns, const bf16 *g, i64 g_stride, const bf16 *x, i64 x_stride,
                 float scale, float *out, int transposed) {
  const i64 ranks = (rank + RANKS - 1) / RANKS * RANKS, stride = (columns + 31) / 32 * 32;
  const i64 threads = omp_get_max_threads(), blocks = (tokens + 2 * PAIRS - 1) / (2 * PAIRS);
  float *all = aligned_alloc(64, threads * ranks * stride * sizeof(float));
  int used = 1;
#pragma omp parallel
  {
    float *sums = all + omp_get_thread_num() * ranks * stride;
    int32_t *pairs = calloc(PAIRS * ranks, sizeof(int32_t));
    memset(sums, 0, ranks * stride * sizeof(float));
#pragma omp single nowait
    used = omp_get_num_threads();
#pragma omp for schedule(dynamic, 1)
    for (i64 b = 0; b < blocks; b++) {
      const i64 from = 2 * PAIRS * b, n = tokens - from < 2 * PAIRS ? tokens - from : 2 * PAIRS;
      for (i64 i = 0; i < (n + 1) / 2; i++) {
        const bf16 *row = g + (from + 2 * i) * g_stride;
        for (i64 r = 0; r < rank; r++)
          pairs[i * ranks + r] = row[r] | (2 * i + 1 < n ? (uint32_t)row[g_stride + r] << 16 : 0);
      }
      for (i64 c = 0; c < columns; c += 32)
        for (i64 r = 0; r < ranks; r += RANKS)
          outer_tile(pairs + r, ranks, x + from * x_stride + c, x_stride, (n + 1) / 2, n & 1,
                     columns - c >= 32 ? 0xffffffff : (1u << (columns - c)) - 1, sums + r * stride + c, stride);
    }
#pragma omp for schedule(static)
    for (i64 r = 0; r < rank; r++)
      for (i64 c = 0; c < columns; c++) {
        float sum = 0;
        for (i64 t = 0; t < used; t++) sum += all[(t * ranks + r) * stride + c];
        out[transposed ? c * rank + r : r * columns + c] = sum * scale;
      }
    free(pairs);
  }
  free(all);
}
#else
int64_t train_product_rows(void) { return 0; } /* leave products to the library */
#endif
