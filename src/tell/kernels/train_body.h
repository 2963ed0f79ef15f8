/* Included by train.c with T (type in memory), LD, ST (to and from fp32) and N (name of the variant). */

/* y = x / rms(x) * (offset + w), row by row; rows lie `stride` elements apart in groups of `heads` x `width`.
   x: tokens x (heads of width), the heads of one token adjacent. rstd: tokens x heads. */
void N(rmsnorm)(const T *x, i64 x_stride, T *y, i64 y_stride, const T *w, float *rstd, i64 tokens, i64 heads,
                i64 width, float eps, float offset) {
#pragma omp parallel for collapse(2) schedule(static)
  for (i64 t = 0; t < tokens; t++)
    for (i64 h = 0; h < heads; h++) {
      const T *in = x + t * x_stride + h * width;
      T *out = y + t * y_stride + h * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 i = 0; i < width; i++) {
        float v = LD(in[i]);
        sum += v * v;
      }
      float r = 1.0f / sqrtf(sum / (float)width + eps);
      rstd[t * heads + h] = r;
#pragma omp simd
      for (i64 i = 0; i < width; i++) out[i] = ST(LD(in[i]) * r * (offset + LD(w[i])));
    }
}

/* dx = r * (g - x r^2 mean(g x)), g = dy (offset + w); the weight is frozen. */
void N(rmsnorm_back)(const T *dy, i64 dy_stride, const T *x, i64 x_stride, const T *w, const float *rstd, T *dx,
                     i64 dx_stride, i64 tokens, i64 heads, i64 width, float offset) {
#pragma omp parallel for collapse(2) schedule(static)
  for (i64 t = 0; t < tokens; t++)
    for (i64 h = 0; h < heads; h++) {
      const T *g = dy + t * dy_stride + h * width, *in = x + t * x_stride + h * width;
      T *out = dx + t * dx_stride + h * width;
      float r = rstd[t * heads + h], dot = 0;
#pragma omp simd reduction(+ : dot)
      for (i64 i = 0; i < width; i++) dot += LD(g[i]) * (offset + LD(w[i])) * LD(in[i]);
      float c = dot / (float)width * r * r;
#pragma omp simd
      for (i64 i = 0; i < width; i++) out[i] = ST(r * (LD(g[i]) * (offset + LD(w[i])) - LD(in[i]) * c));
    }
}

static inline float N(gate)(float g, int kind, float *slope) {
  if (kind == 0) { /* silu */
    float s = 1.0f / (1.0f + fast_exp(-g));
    *slope = s * (1.0f + g * (1.0f - s));
    return g * s;
  }
  /* gelu by tanh */
  float u = 0.7978845608f * (g + 0.044715f * g * g * g);
  u = u > 15.0f ? 15.0f : (u < -15.0f ? -15.0f : u);
  float e = fast_exp(2.0f * u), th = (e - 1.0f) / (e + 1.0f);
  *slope = 0.5f * (1.0f + th) + 0.5f * g * (1.0f - th * th) * 0.7978845608f * (1.0f + 0.134145f * g * g);
  return 0.5f * g * (1.0f + th);
}

/* h = act(g) u for tokens x width; kind 0 silu, 1 gelu (tanh). */
void N(gated)(const T *g, const T *u, i64 stride, T *h, i64 tokens, i64 width, int kind) {
#pragma omp parallel for schedule(static)
  for (i64 t = 0; t < tokens; t++) {
    const T *a = g + t * stride, *b = u + t * stride;
    T *out = h + t * width;
    float slope;
    if (kind == 0) {
#pragma omp simd private(slope)
      for (i64 i = 0; i < width; i++) out[i] = ST(N(gate)(LD(a[i]), 0, &slope) * LD(b[i]));
    } else {
#pragma omp simd private(slope)
      for (i64 i = 0; i < width; i++) out[i] = ST(N(gate)(LD(a[i]), 1, &slope) * LD(b[i]));
    }
  }
}

#define BACK(KIND)                                                  \
  for (i64 i = 0; i < width; i++) {                                 \
    float slope, d = LD(e[i]), act = N(gate)(LD(a[i]), KIND, &slope); \
    float up = LD(b[i]);                                            \
    oa[i] = ST(d * up * slope);                                     \
    ob[i] = ST(d * act);                                            \
    e[i] = ST(act * up);                                            \
  }

/* dg, du (rows `out_stride` apart) from dh, which becomes h again. */
void N(gated_back)(T *dh, const T *g, const T *u, i64 stride, T *dg, T *du, i64 out_stride, i64 tokens,
                   i64 width, int kind) {
#pragma omp parallel for schedule(static)
  for (i64 t = 0; t < tokens; t++) {
    const T *a = g + t * stride, *b = u + t * stride;
    T *e = dh + t * width;
    T *oa = dg + t * out_stride, *ob = du + t * out_stride;
    if (kind == 0) {
#pragma omp simd
      BACK(0)
    } else {
#pragma omp simd
      BACK(1)
    }
  }
}
#undef BACK

/* o = scale * rope(in) for one head of one token. */
static inline void N(turn)(const T *in, T *o, const T *c, const T *s, i64 half, i64 width, float scale) {
#pragma omp simd
  for (i64 d = 0; d < half; d++) {
    float a = LD(in[d]), b = LD(in[d + half]);
    o[d] = ST((a * LD(c[d]) - b * LD(s[d])) * scale);
    o[d + half] = ST((b * LD(c[d + half]) + a * LD(s[d + half])) * scale);
  }
#pragma omp simd
  for (i64 d = 2 * half; d < width; d++) o[d] = ST(LD(in[d]) * scale);
}

/* Rows of a block from tokens x (heads of width, tokens x_stride apart), rotated by cos, sin (tokens x rot; null: not)
   and scaled: out (heads / group, rows, group, longest, width). In front of every row stand the tokens 0 .. prefix,
   behind its own length zeros; longest counts both. */
void N(pack)(const T *x, i64 x_stride, const T *cosine, const T *sine, i64 rot, T *out, const i64 *start,
             const i64 *length, i64 rows, i64 longest, i64 prefix, i64 heads, i64 group, i64 width, float scale) {
#pragma omp parallel for collapse(2) schedule(static)
  for (i64 h = 0; h < heads; h++)
    for (i64 r = 0; r < rows; r++) {
      T *block = out + ((((h / group) * rows + r) * group + h % group) * longest) * width;
      i64 n = prefix + length[r];
      for (i64 i = 0; i < n; i++) {
        i64 t = i < prefix ? i : start[r] + i - prefix;
        const T *in = x + t * x_stride + h * width;
        if (cosine)
          N(turn)(in, block + i * width, cosine + t * rot, sine + t * rot, rot / 2, width, scale);
        else if (scale == 1.0f)
          memcpy(block + i * width, in, width * sizeof(T));
        else
          N(turn)(in, block + i * width, 0, 0, 0, width, scale);
      }
      memset(block + n * width, 0, (longest - n) * width * sizeof(T));
    }
}

/* The way back, for the rows' own tokens: x from in (heads / group, rows, group, longest, width), rotation transposed. */
void N(unpack)(const T *in, i64 rows, i64 longest, i64 prefix, i64 heads, i64 group, i64 width, const T *cosine,
               const T *sine, i64 rot, T *x, i64 x_stride, const i64 *start, const i64 *length, float scale) {
  i64 half = rot / 2;
#pragma omp parallel for collapse(2) schedule(static)
  for (i64 r = 0; r < rows; r++)
    for (i64 h = 0; h < heads; h++) {
      const T *block = in + ((((h / group) * rows + r) * group + h % group) * longest + prefix) * width;
      for (i64 i = 0; i < length[r]; i++) {
        i64 t = start[r] + i;
        const T *o = block + i * width;
        T *out = x + t * x_stride + h * width;
        if (cosine) {
          const T *c = cosine + t * rot, *s = sine + t * rot;
#pragma omp simd
          for (i64 d = 0; d < half; d++) {
            float a = LD(o[d]), b = LD(o[d + half]);
            out[d] = ST((a * LD(c[d]) + b * LD(s[d + half])) * scale);
            out[d + half] = ST((b * LD(c[d + half]) - a * LD(s[d])) * scale);
          }
#pragma omp simd
          for (i64 d = 2 * half; d < width; d++) out[d] = ST(LD(o[d]) * scale);
        } else if (scale == 1.0f) {
          memcpy(out, o, width * sizeof(T));
        } else {
#pragma omp simd
          for (i64 d = 0; d < width; d++) out[d] = ST(LD(o[d]) * scale);
        }
      }
    }
}

/* sum (heads, prefix, width) += what the rows' copies of the prefix gathered in `in` (heads, rows, longest, width). */
void N(gather_prefix)(const T *in, i64 rows, i64 longest, i64 prefix, i64 heads, i64 width, float *sum) {
#pragma omp parallel for schedule(static)
  for (i64 c = 0; c < heads * prefix; c++) {
    i64 h = c / prefix, i = c % prefix;
    float *out = sum + c * width;
    for (i64 r = 0; r < rows; r++) {
      const T *x = in + ((h * rows + r) * longest + i) * width;
#pragma omp simd
      for (i64 d = 0; d < width; d++) out[d] += LD(x[d]);
    }
  }
}

/* x (heads, longest, width) += sum (heads, prefix, width) in its first `prefix` positions. */
void N(add_prefix)(T *x, i64 longest, i64 prefix, i64 heads, i64 width, const float *sum) {
  for (i64 h = 0; h < heads; h++) {
    T *out = x + h * longest * width;
    const float *in = sum + h * prefix * width;
#pragma omp simd
    for (i64 d = 0; d < prefix * width; d++) out[d] = ST(LD(out[d]) + in[d]);
  }
}

#define VECTOR 16 /* loops over keys run in whole vectors; what lies outside the sight is masked */

/* Softmax in place, causal and windowed. scores: queries x keys, keys a multiple of 16; query m stands at position
   m % longest of its row and sees `prefix` keys in front of it, its row up to itself, `window` keys at most. */
void N(softmax)(T *scores, i64 queries, i64 longest, i64 keys, i64 prefix, i64 window) {
#pragma omp parallel
  {
    float *e = aligned_alloc(64, keys * sizeof(float));
#pragma omp for schedule(static)
    for (i64 m = 0; m < queries; m++) {
      int end = (int)(prefix + m % longest + 1);
      if (end > keys) end = (int)keys;
      int from = end > window ? end - (int)window : 0;
      int first = from / VECTOR * VECTOR, last = (end + VECTOR - 1) / VECTOR * VECTOR;
      T *p = scores + m * keys;
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (int j = first; j < last; j++) {
        float v = j >= from && j < end ? LD(p[j]) : -INFINITY;
        e[j] = v;
        top = v > top ? v : top;
      }
#pragma omp simd reduction(+ : sum)
      for (int j = first; j < last; j++) {
        float v = j >= from && j < end ? fast_exp(e[j] - top) : 0.0f;
        e[j] = v;
        sum += v;
      }
      float inverse = 1.0f / sum;
      memset(p, 0, first * sizeof(T));
#pragma omp simd
      for (int j = first; j < last; j++) p[j] = ST(e[j] * inverse);
      memset(p + last, 0, (keys - last) * sizeof(T));
    }
    free(e);
  }
}

/* ds = p (dp - sum(p dp)) into dp; p is 0 out of sight. */
void N(softmax_back)(const T *probs, T *grads, i64 queries, i64 longest, i64 keys, i64 prefix) {
#pragma omp parallel for schedule(static)
  for (i64 m = 0; m < queries; m++) {
    int last = (int)((prefix + m % longest + VECTOR) / VECTOR * VECTOR);
    if (last > keys) last = (int)keys;
    const T *p = probs + m * keys;
    T *d = grads + m * keys;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int j = 0; j < last; j++) dot += LD(p[j]) * LD(d[j]);
#pragma omp simd
    for (int j = 0; j < last; j++) d[j] = ST(LD(p[j]) * (LD(d[j]) - dot));
    memset(d + last, 0, (keys - last) * sizeof(T));
  }
}
#undef VECTOR

/* nll of each row and, in place of its logits, weight * (softmax - onehot), or nothing where weight is null. */
void N(cross_entropy)(T *logits, const i64 *target, const float *weight, float *nll, i64 rows, i64 vocabulary) {
#pragma omp parallel
  {
    float *e = malloc(vocabulary * sizeof(float));
#pragma omp for schedule(static)
    for (i64 r = 0; r < rows; r++) {
      T *x = logits + r * vocabulary;
      float top = -INFINITY, sum = 0, picked = LD(x[target[r]]);
#pragma omp simd reduction(max : top)
      for (i64 j = 0; j < vocabulary; j++) {
        float v = LD(x[j]);
        top = v > top ? v : top;
      }
#pragma omp simd reduction(+ : sum)
      for (i64 j = 0; j < vocabulary; j++) {
        e[j] = fast_exp(LD(x[j]) - top);
        sum += e[j];
      }
      nll[r] = logf(sum) + top - picked;
      if (weight) {
        float c = weight[r] / sum;
#pragma omp simd
        for (i64 j = 0; j < vocabulary; j++) x[j] = ST(e[j] * c);
        x[target[r]] = ST(e[target[r]] * c - weight[r]);
      }
    }
    free(e);
  }
}

/* A bijective mix of 32 bits (lowbias32, Wellons 2018). */
static inline uint32_t N(mix)(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

/* The word of element i under a seed; mixed twice, so that two seeds' words are no plain shift of each other. */
static inline uint32_t N(word)(uint32_t i, uint32_t seed) { return N(mix)(N(mix)(i) + seed); }

/* y = kept(x) * scale, an element kept where its word is at least `threshold`; add: y += instead. */
void N(dropout)(const T *x, T *y, i64 n, uint32_t seed, uint32_t threshold, float scale, int add) {
  const i64 chunk = 4096;
#pragma omp parallel for schedule(static)
  for (i64 c = 0; c < (n + chunk - 1) / chunk; c++) {
    i64 end = (c + 1) * chunk < n ? (c + 1) * chunk : n;
    if (add) {
#pragma omp simd
      for (i64 i = c * chunk; i < end; i++)
        y[i] = ST(LD(y[i]) + (N(word)((uint32_t)i, seed) >= threshold ? LD(x[i]) * scale : 0.0f));
    } else {
#pragma omp simd
      for (i64 i = c * chunk; i < end; i++)
        y[i] = ST(N(word)((uint32_t)i, seed) >= threshold ? LD(x[i]) * scale : 0.0f);
    }
  }
}
