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
  const bf16 *into;  /* inputs to ranks, or NULL: no adapters */
  i64 into_stride;
  const bf16 *out_of; /* ranks to outputs */
  i64 out_of_stride;
  i64 columns; /* outputs are columns of all three: y = x W; otherwise rows: y = x W^T */
  bf16 *inner; /* (tokens, rank rounded up to even) or NULL */
  bf16 *y;
  i64 y_stride;
  i64 adapters;
  const i64 *ends;    /* of the ranks of each adapter; even where there is dropout */
  uint32_t threshold; /* of dropout on the adapters' inputs, 0 for none; on their way out where outputs are columns */
  uint32_t seed;      /* of the first adapter; each has the next */
} train_product_task;

/* A bijective mix of 32 bits (lowbias32, Wellons 2018), as in train_body.h. */
INLINE __m512i mix_lanes(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)0x846ca68bu));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

/* Which of the elements at .. at + 15 the kernel `dropout` keeps. */
INLINE __mmask16 kept(i64 at, uint32_t seed, uint32_t threshold) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i word = mix_lanes(_mm512_add_epi32(lanes, _mm512_set1_epi32((int)(uint32_t)at)));
  word = mix_lanes(_mm512_add_epi32(word, _mm512_set1_epi32((int)seed)));
  return _mm512_cmpge_epu32_mask(word, _mm512_set1_epi32((int)threshold));
}

static inline i64 begin_of(const train_product_task *t, i64 adapter) { return adapter ? t->ends[adapter - 1] : 0; }

/* sums += kept(inner out_of), adapter by adapter, of one tile. */
static void add_dropped(const train_product_task *t, i64 row, i64 column, const bf16 *extra, float *sums) {
  const i64 ranks = even(t->rank);
  for (i64 a = 0; a < t->adapters; a++) {
    const i64 begin = begin_of(t, a);
    __m512 s[ROWS][4];
    clear(ROWS, 4, s);
    multiply(ROWS, 4, 4, t->inner + row * ranks + begin, ranks, 2, (t->ends[a] - begin) / 2, extra + begin * PANEL, s);
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int b = 0; b < 4; b++) {
      float *sum = sums + i * PANEL + b * LANES;
      __mmask16 mask = kept((row + i) * t->outputs + column + b * LANES, t->seed + (uint32_t)a, t->threshold);
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_maskz_mov_ps(mask, s[i][b])));
    }
  }
}

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
  if (t->inner && t->columns && t->threshold) {
    store_sums(ROWS, 4, s, sums, PANEL);
    add_dropped(t, row, column, extra, sums);
    load_sums(ROWS, 4, s, sums, PANEL);
  } else if (t->inner) {
    multiply(ROWS, 4, 4, t->inner + row * ranks, ranks, 2, ranks / 2, extra, s);
  }
  store(ROWS, 4, s, t->y + row * t->y_stride + column, t->y_stride, wide);
}

/* Ranks column .. width of inner, of one tile of rows. */
INLINE void thin_tile(int vectors, const train_product_task *t, const bf16 *x, i64 stride, i64 row, i64 column, i64 end,
                      const bf16 *panel) {
  __m512 s[THIN_ROWS][vectors];
  clear(THIN_ROWS, vectors, s);
  multiply(THIN_ROWS, vectors, vectors, x, stride, 2, t->inputs / 2, panel, s);
  i64 width = even(t->rank);
  store(THIN_ROWS, vectors, s, t->inner + row * width + column, width, end - column);
}

/* Ranks of the panel of `into` that begins at a rank: two vectors, or one where that is enough. */
static inline i64 thin_width(i64 end, i64 at) { return end - at > LANES ? 2 * LANES : LANES; }

/* Adapters that are taken one by one: each has an input of its own under dropout. */
static inline i64 inputs_of(const train_product_task *t) { return t->threshold && !t->columns ? t->adapters : 1; }

/* inner = x into for the rows from .. to; `room` holds a tile of rows. */
static void thin_rows(const train_product_task *t, i64 from, i64 to, const bf16 *into, bf16 *room) {
  const i64 apart = inputs_of(t);
  for (i64 r = from; r < to; r += THIN_ROWS) {
    const i64 row = r + THIN_ROWS <= to ? r : to - THIN_ROWS; /* the last tile overlaps the one before */
    const bf16 *panel = into;
    for (i64 a = 0; a < apart; a++) {
      const bf16 *x = t->x + row * t->x_stride;
      i64 stride = t->x_stride, begin = begin_of(t, a), end = apart > 1 ? t->ends[a] : even(t->rank);
      if (t->threshold && !t->columns) {
        for (i64 i = 0; i < THIN_ROWS; i++)
          for (i64 k = 0; k < t->inputs; k += LANES) {
            __mmask16 mask = first(t->inputs - k) & kept((row + i) * t->inputs + k, t->seed + (uint32_t)a, t->threshold);
            _mm256_storeu_epi16(room + i * up(t->inputs, LANES) + k, _mm256_maskz_loadu_epi16(mask, x + i * stride + k));
          }
        x = room, stride = up(t->inputs, LANES);
      }
      for (i64 c = begin; c < end; c += 2 * LANES) {
        if (thin_width(end, c) == LANES)
          thin_tile(1, t, x, stride, row, c, end, panel);
        else
          thin_tile(2, t, x, stride, row, c, end, panel);
        panel += thin_width(end, c) * t->inputs;
      }
    }
  }
}

/* Panels of `into` one behind the other; with no room given, how many numbers they take. */
static i64 lay_out_into(const train_product_task *t, bf16 *to) {
  const i64 apart = inputs_of(t);
  i64 at = 0;
  for (i64 a = 0; a < apart; a++) {
    const i64 end = apart > 1 ? t->ends[a] : even(t->rank);
    for (i64 c = begin_of(t, a); c < end; c += 2 * LANES) {
      if (to)
        lay_out(t->into + c * (t->columns ? 1 : t->into_stride), t->into_stride, t->columns,
                (end < t->rank ? end : t->rank) - c, t->inputs, thin_width(end, c), to + at);
      at += thin_width(end, c) * t->inputs;
    }
  }
  return at;
}

/* y = x weight + bias + inner out_of, with inner = x into where that is given, for the rows from .. to and the panels
   that are laid out; `sums` has room for BLOCK x PANEL. */
static void rows_of(const train_product_task *t, i64 from, i64 to, i64 column, i64 end, const bf16 *panels,
                    const bf16 *into, const bf16 *out_of, float *sums, bf16 *room) {
  if (into) thin_rows(t, from, to, into, room);
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
  bf16 *panels = aligned_alloc(64, (group * PANEL * k + all * PANEL * ranks + lay_out_into(t, NULL)) * sizeof(bf16) + 64);
  bf16 *out_of = panels + group * PANEL * k, *into = out_of + all * PANEL * ranks;
#pragma omp parallel
  {
    float *sums = aligned_alloc(64, (BLOCK + ROWS) * PANEL * sizeof(float));
    bf16 *room = malloc(THIN_ROWS * (k + LANES) * sizeof(bf16));
    if (t->inner) {
#pragma omp for schedule(static) nowait
      for (i64 p = 0; p < all; p++)
        lay_out(t->out_of + p * PANEL * (t->columns ? 1 : t->out_of_stride), t->out_of_stride, t->columns,
                t->outputs - p * PANEL, t->rank, PANEL, out_of + p * PANEL * ranks);
    }
    if (t->into) {
#pragma omp single nowait
      lay_out_into(t, into);
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
                t->into && !g ? into : NULL, out_of, sums, room);
    }
    free(sums);
    free(room);
  }
  free(panels);
}

#define PAIRS 64 /* of tokens: what they multiply stays in the second-level cache */
#define RANKS 8  /* x 2 vectors of columns: 16 sums */

/* sums (RANKS, 32 columns, rows `stride` apart) += g^T x over pairs of tokens; odd: the last has one. The first element
   of x is number `at` for dropout. */
static void outer_tile(const int32_t *g, i64 g_stride, const bf16 *x, i64 x_stride, i64 pairs, int odd, __mmask32 mask,
                       float *sums, i64 stride, i64 at, i64 columns, uint32_t threshold, uint32_t seed) {
  static const uint16_t order[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512 s[RANKS][2];
  load_sums(RANKS, 2, s, sums, stride);
  for (i64 p = 0; p < pairs; p++) {
    const bf16 *row = x + 2 * p * x_stride;
    __mmask32 one = mask, two = odd && p == pairs - 1 ? 0 : mask;
    if (threshold) {
      const i64 i = at + 2 * p * columns, j = i + columns;
      one &= kept(i, seed, threshold) | (__mmask32)kept(i + LANES, seed, threshold) << 16;
      two &= kept(j, seed, threshold) | (__mmask32)kept(j + LANES, seed, threshold) << 16;
    }
    __m512i a = _mm512_maskz_loadu_epi16(one, row), b = _mm512_maskz_loadu_epi16(two, row + x_stride);
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
   columns); with a threshold of what `dropout` keeps of x. */
void train_outer(i64 tokens, i64 rank, i64 columns, const bf16 *g, i64 g_stride, const bf16 *x, i64 x_stride,
                 float scale, float *out, int transposed, uint32_t threshold, uint32_t seed) {
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
                     columns - c >= 32 ? 0xffffffff : (1u << (columns - c)) - 1, sums + r * stride + c, stride,
                     from * columns + c, columns, threshold, seed);
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
