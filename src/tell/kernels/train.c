/* Training kernels, once for bf16 and once for fp32. */
#include "bits.h"

/* One row of a task of attention: its first token, queries, keys in front of them, all keys. */
typedef struct { i64 start, length, ahead, keys; } train_row;

static inline i64 row_token(const train_row *r, i64 i) { return i < r->ahead ? i : r->start + i - r->ahead; }

/* Keys of the row that its query i sees end here; from where on, sight_begin tells. */
static inline i64 sight_end(const train_row *r, i64 i) { return i < r->length ? r->ahead + i + 1 : 0; }

#define T bf16
#define LD from_bf16
#define ST to_bf16
#define N(name) name##_bf16
#include "train_body.h"
#include "train_attention_task.h"
#undef T
#undef LD
#undef ST
#undef N

#define T float
#define LD(x) (x)
#define ST(x) (x)
#define N(name) name##_fp32
#include "train_body.h"
#include "train_attention_task.h"
#undef T
#undef LD
#undef ST
#undef N

#include "train_attention.h"
#include "train_attention_fp32.h"
