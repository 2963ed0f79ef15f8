/* What attention of training is given, once for each number format: T and N as in train_body.h. */
typedef struct {
  i64 tokens, rows, prefix, heads, key_heads, width, rotary, window;
  const i64 *start, *length; /* of each row, the longest first; each sees the tokens 0 .. prefix in front of it */
  const T *q, *k, *v;        /* tokens x heads of width */
  i64 q_stride, k_stride, v_stride;
  const T *cosine, *sine; /* tokens x rotary */
  float scaling;
  T *out;      /* (tokens, heads * width) */
  float *lse;  /* (tokens, heads): logarithm of the sum of exponentials */
  const T *go; /* gradient of out, (tokens, heads * width) */
  T *gq, *gk, *gv;
  i64 g_stride;
} N(train_attention_task);

static inline train_row N(row_of)(const N(train_attention_task) * t, i64 r) {
  if (r < 0) return (train_row){0, t->prefix, 0, t->prefix};
  return (train_row){t->start[r], t->length[r], t->prefix, t->prefix + t->length[r]};
}

static inline i64 N(sight_begin)(const N(train_attention_task) * t, i64 end) {
  return end > t->window ? end - t->window : 0;
}
