/* Products of many rows with frozen bf16 weights and a low-rank adapter beside them, and the adapter's gradients, where
 * the processor has dot products of bf16 pairs but no tile unit.
 *
 * A library lays the weight out anew at each call, and the thin products of an adapter, bound by memory, cost it as much
 * as a fifth of the large one. Here a block of rows stays in the second-level cache while it is multiplied by both.
 * Weights are laid out in panels of 64 outputs, [inputs / 2][64][2]: a vector holds one pair of inputs of 16 outputs.
 */
#include "tiles.h"
#ifdef TELL_TILES
#define THIN_ROWS 12    /* x 1 or 2 vectors, for the adapter's few columns */
#define BLOCK 240       /* rows of one job */
#define DEPTH 1536      /* inputs at a time: a panel of them stays in the second-level cache */
#define GROUP (1 << 21) /* numbers of the weight that are laid out at a time */

int64_t train_product_rows(void) { return THIN_ROWS; }

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
    load_sums(ROWS, 4, s, sums, PANEL);
  } else {
    UNROLL for (int b = 0; b < 4; b++) {
      __m512i bias = _mm512_setzero_si512();
      if (t->bias)
        bias = _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(wide - b * LANES), t->bias + column + b * LANES)), 16);
      UNROLL for (int i = 0; i < ROWS; i++) s[i][b] = (__m512)bias;
    }
  }
  multiply(ROWS, 4, 4, t->x + row * t->x_stride + from, t->x_stride, 2, depth / 2, panel, s);
  if (from + depth < t->inputs) {
    store_sums(ROWS, 4, s, sums, PANEL);
    return;
  }
  const i64 ranks = even(t->rank);
  if (t->inner) multiply(ROWS, 4, 4, t->inner + row * ranks, ranks, 2, ranks / 2, extra, s);
  store(ROWS, 4, s, t->y + row * t->y_stride + column, t->y_stride, wide);
}

INLINE void thin_tile(int vectors, const train_product_task *t, i64 row, i64 column, const bf16 *panel) {
  __m512 s[THIN_ROWS][vectors];
  clear(THIN_ROWS, vectors, s);
  multiply(THIN_ROWS, vectors, vectors, t->x + row * t->x_stride, t->x_stride, 2, t->inputs / 2, panel, s);
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
  load_sums(RANKS, 2, s, sums, stride);
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
  store_sums(RANKS, 2, s, sums, stride);
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
#pragma omp for schedule(static) /* so that sums are the same at every call */
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
