/* The contract between the kernels and Rust: one argument struct for each kernel, in plain C.
 *
 * src/backend/cuda/kernels.rs is made from this file by bindgen and committed. Activations are stored in the type that the
 * kernel's name ends in: f32, f16 or bf16. Matrices have that type too; vectors, the residual stream, router logits and
 * partial results are f32. Kernels of attention are named by the type of K/V, which may be a narrower one. Widths, but that
 * of the vocabulary, are multiples of 8, head_dim is one of 16 and at most 256; buffers start at multiples of 16 bytes.
 */
#ifndef MINDSKIP_KERNELS_H
#define MINDSKIP_KERNELS_H

#include <stdint.h>

/* K/V pages that are worth a block of their own in decode. */
#define DECODE_PAGES 2

/* Types of numbers. */
#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_BF16 2

/* Rows of one page of the KV cache. */
#define KV_PAGE 64

/* What an op did, added up by the kernel over its calls; the host makes FLOPs and bytes of it. */
typedef struct WorkCount {
    uint64_t row_calls; /* calls that had rows */
    uint64_t rows;
    uint64_t kv_calls; /* calls that had K/V rows */
    uint64_t kv_rows;
    uint64_t pairs; /* (query row, K/V row) pairs */
} WorkCount;

/* The rows an op works on: index[0..n), ascending; n = *count, or bound where count is null. Nothing of index is read
 * beyond n. */
typedef struct RowSet {
    const uint32_t *index;
    const uint32_t *count;
    uint32_t bound;
} RowSet;

/* The K/V of one layer. Row r of a sequence stands in page tables[slot][r / KV_PAGE], at r % KV_PAGE. */
typedef struct KvLayer {
    void *data;             /* [pages, kv_heads, 2, KV_PAGE, head_dim]: K, then V */
    uint32_t *positions;    /* [pages, KV_PAGE]: original positions */
    const uint32_t *tables; /* [slots, pages_per_seq] */
    uint32_t *lens;         /* [slots]: rows held */
    uint32_t pages_per_seq;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t type; /* of data */
} KvLayer;

/* pointwise.cu */

/* out[i] = table[ids[i]]. A block a row. */
typedef struct EmbedArgs {
    const void *table;   /* [vocab, width] */
    const uint32_t *ids; /* [rows] */
    float *out;          /* [rows, width] */
    uint32_t rows;
    uint32_t width;
} EmbedArgs;

/* out[i] = [cos(pos[i] * f) | sin(pos[i] * f)], the product rounded to f32 first. A block a row. */
typedef struct RopeAnglesArgs {
    const uint32_t *pos;   /* [rows] */
    const float *inv_freq; /* [half] */
    float *out;            /* [rows, 2 * half] */
    uint32_t rows;
    uint32_t half;
} RopeAnglesArgs;

/* out[i] = x[index[i]] / sqrt(mean(x^2) + eps) * weight, and logits[index[i]] = out[i] . router before it is rounded. A
 * block a row. */
typedef struct NormGateArgs {
    const float *x; /* [*, width] */
    RowSet rows;
    const float *weight; /* [width] */
    float eps;
    uint32_t width;
    void *out;           /* [rows, width], or null */
    const float *router; /* [width], or null */
    float *logits;       /* [*] */
    WorkCount *work;     /* or null */
} NormGateArgs;

/* out[i] = src[index[i] - base]. A block a row. */
typedef struct GatherArgs {
    const void *src; /* [*, width] */
    RowSet rows;
    uint32_t base;
    uint32_t width; /* of 16 bytes each */
    void *out; /* [rows, width] */
} GatherArgs;

/* x[index[i]] += src[i] + bias, or x[index[i]] = src[i] + bias. A block a row. */
typedef struct ScatterArgs {
    const float *src;  /* [rows, width] */
    const float *bias; /* [width], or null */
    RowSet rows;
    uint32_t width;
    uint32_t add;
    float *x; /* [*, width] */
} ScatterArgs;

/* out = silu(gate) * up, out may be gate. A block a row. */
typedef struct SiluMulArgs {
    const void *gate; /* [rows, width] */
    const void *up;
    void *out;
    uint32_t rows;
    uint32_t width;
} SiluMulArgs;

/* out[i] = bias, or out[i] += bias: before a product that is added to it, so that the sum is rounded once. A block a row. */
typedef struct BiasArgs {
    void *out; /* [rows, width] */
    const float *bias;
    uint32_t rows;
    uint32_t width;
    uint32_t add;
} BiasArgs;

/* out[i] = logits[i, targets[i]] - logsumexp(logits[i]); NaN for a row with a NaN, +inf, or nothing but -inf. A block a
 * row. */
typedef struct LogProbsArgs {
    const float *logits;     /* [rows, vocab] */
    const uint32_t *targets; /* [rows] */
    float *out;              /* [rows] */
    uint32_t rows;
    uint32_t vocab;
} LogProbsArgs;

/* sample.cu: launches over rows, by blockIdx.x, or by blockIdx.y where a row takes many blocks. */

/* Logits of which the best is told together. */
#define SAMPLE_GROUP 16
/* Logits that a block weighs, and words of how a row is drawn: see Sample in src/backend/ops.rs. */
#define SAMPLE_CHUNK 2048
#define SAMPLE_DRAW 6
/* No token: see SAMPLE_NONE there. */
#define SAMPLE_NONE 0xffffffff

/* What may be drawn of a row: logits of `floor` and more. */
typedef struct SampleBounds {
    float highest;
    float floor;
    uint32_t drawn; /* 0: the token is chosen already */
} SampleBounds;

typedef struct SampleArgs {
    const float *logits;   /* [rows, vocab] */
    const uint32_t *draws; /* [rows, SAMPLE_DRAW], or null: all are greedy */
    uint64_t *best;        /* [rows, groups]: rank of the best logit, then the lowest id that has it, inverted */
    SampleBounds *bounds;  /* [rows] */
    uint64_t *keys;        /* [rows, chunks, SAMPLE_CHUNK] */
    uint64_t *sums;        /* [rows, chunks] */
    uint32_t *counts;      /* [rows, chunks] */
    uint32_t *tokens;      /* [rows] */
    uint32_t vocab;
    uint32_t groups;
    uint32_t chunks;
} SampleArgs;

/* Puts values from the host in their places: runs of [offset, length, values...], one block a run. */
typedef struct PutIntsArgs {
    const uint32_t *runs;
    const uint32_t *starts; /* [n]: where each run begins */
    uint32_t *ints;
} PutIntsArgs;

/* out[i] = mean + scale * u for a u of [-1, 1) that is a hash of seed and i: see src/backend/noise.rs. */
typedef struct NoiseArgs {
    void *out; /* [n] */
    uint64_t n; /* a multiple of 8 */
    uint64_t seed;
    float mean;
    float scale;
} NoiseArgs;

/* route.cu */

#define ROUTE_ALL 0
#define ROUTE_THRESHOLD 1
#define ROUTE_TOP_K 2
#define ROUTE_SEQUENCE 3

/* See Route in src/backend/ops.rs. One block. */
typedef struct RouteArgs {
    const float *logits; /* [rows] */
    const uint32_t *pos; /* [rows] */
    const uint32_t *seq_start; /* [seqs + 1] */
    const uint32_t *slots;     /* [seqs] */
    uint32_t *decided;         /* [seqs] */
    const uint32_t *cut_rows;  /* [cuts] */
    uint32_t *active;          /* [rows] */
    uint32_t *active_at;       /* [cuts] */
    uint32_t *first;           /* [rows] */
    uint32_t *end;             /* [rows] */
    uint32_t *kv_row;          /* [rows] */
    uint32_t *scratch;         /* [rows + 1] */
    KvLayer kv;
    uint32_t rows;
    uint32_t seqs;
    uint32_t cuts;
    uint32_t decide; /* ROUTE_... */
    float share;     /* the threshold, or the share of ROUTE_TOP_K */
    uint32_t window; /* in original positions; 0: none */
    uint32_t queries_active; /* 0: every row queries */
    uint32_t keys_active;    /* 0: every row keeps its K/V */
} RouteArgs;

/* rope_append.cu: q/k norm, RoPE and K/V into their pages. Heads take head_dim / 16 threads, rounded up to a power of 2. */
typedef struct RopeAppendArgs {
    const float *angles;      /* [*, head_dim]: cosines, then sines, by row of the residual stream */
    const uint32_t *pos;      /* [*] */
    const uint32_t *row_slot; /* [*] */
    RowSet q_rows;
    RowSet kv_rows;
    const uint32_t *kv_row; /* [kv_rows] */
    void *q;                /* [q_rows, heads, head_dim], in place */
    const void *k;          /* [kv_rows, kv_heads, head_dim] */
    const void *v;
    const float *q_norm; /* [head_dim], or null */
    const float *k_norm;
    float eps;
    uint32_t heads;
    KvLayer kv;
    WorkCount *work; /* or null */
} RopeAppendArgs;

/* attention_*.cu: out[i] = softmax(scale * q[i] . K) . V over the K/V rows [first[i], end[i]) of the row's sequence. Both
 * ends ascend within a sequence, whose rows stand together. */
typedef struct AttendArgs {
    const void *q; /* [rows, heads, head_dim] */
    void *out;     /* [rows, heads, head_dim] */
    RowSet rows;
    const uint32_t *row_slot; /* [*], by row of the residual stream */
    const uint32_t *first;    /* [rows] */
    const uint32_t *end;      /* [rows] */
    KvLayer kv;
    uint32_t heads;
    uint32_t type; /* of q and out; many rows are rounded to the type of K/V on their way */
    float scale;
    /* Decode: blocks that keep the GPU busy, to which the K/V of all rows and heads are dealt out; the last block of a
     * row to end merges what they found. */
    uint32_t blocks;
    float *partial;    /* [gridDim.x, heads, head_dim] sums, then [gridDim.x, heads, 2] maximum, denominator */
    uint32_t *tickets; /* [rows, kv_heads], zero before and after */
    WorkCount *work;
} AttendArgs;

/* A matrix in memory and the box of it that a TMA copy takes, as cuTensorMapEncodeTiled writes it. */
typedef struct TensorMap {
    uint64_t words[16];
} __attribute__((aligned(64))) TensorMap;

/* attention_hopper.cu: the same for many rows. */
typedef struct AttendHopperArgs {
    /* All of kv.data as [*, head_dim], in boxes of [KV_PAGE, 64], their 16-byte units swizzled within 128 bytes. */
    TensorMap pool;
    AttendArgs attend;
} AttendHopperArgs;

/* attention_prefill.cu: what attention would give rows that keep no K/V: over the ranges of `attend`, which may be empty,
 * and their own K and V. f32 throughout. */
typedef struct AttendApartArgs {
    AttendArgs attend;
    const float *k; /* [rows, kv_heads, head_dim] */
    const float *v;
} AttendApartArgs;

/* attention_backward.cu: from the gradient of what attention gave to those of Q, K and V. f32 throughout, in plain
 * arithmetic. K/V rows are counted from the first of each slot. */
typedef struct AttendBackwardArgs {
    AttendArgs attend;  /* as it ran; out: what it gave */
    const float *d_out; /* [rows, heads, head_dim] */
    float *d_q;         /* [rows, heads, head_dim] */
    float *d_k;         /* [kv_rows, kv_heads, head_dim] */
    float *d_v;
    const uint32_t *kv_start; /* [slots + 1]: where the rows of each slot begin in d_k and d_v */
    uint32_t slots;
    /* From the kernel of d_q for that of d_k and d_v: of each query the highest score, what the weights relative to it are
     * multiplied with, and d_out . out; of each slot its query rows. */
    float *stats;     /* [rows, heads, 4] */
    uint32_t *bounds; /* [slots, 2], zero before */
} AttendBackwardArgs;

/* loss.cu: logits become their gradient, scale * (softmax - target). NaN for a row with a NaN or +inf, or nothing but -inf.
 * A block a row. */
typedef struct LossArgs {
    float *logits;           /* [rows, vocab] */
    const uint32_t *targets; /* [rows]: losses are -ln p(target) */
    const float *other;      /* [rows, vocab]: or logits of a distribution q, losses are sum q (ln q - ln p) */
    float *losses;           /* [rows] */
    float scale;
    uint32_t vocab;
} LossArgs;

/* backward.cu: what happens to gradients row by row; see src/backend/gradients.rs. f32 throughout. */

/* d_x[index[i]] += RMSNorm backward of d_h[i] (+ d_logits[index[i]] * router). A block a row. */
typedef struct NormBackwardArgs {
    const float *x;       /* [*, width] */
    const uint32_t *rows; /* [rows] */
    const float *weight;  /* [width] */
    const float *d_h;     /* [rows, width] */
    const float *router;  /* [width], or null */
    const float *d_logits; /* [*] */
    float *d_x;           /* [*, width] */
    float eps;
    uint32_t width;
} NormBackwardArgs;

/* The gradient of rotated heads becomes that of what was projected. Threads as of RopeAppendArgs. */
typedef struct RopeBackwardArgs {
    const float *angles;  /* [*, head_dim]: cosines, then sines */
    const uint32_t *index; /* [rows] */
    float *d;             /* [rows, heads, head_dim] */
    const float *norm;    /* [head_dim], or null */
    const float *src;     /* [rows, heads, head_dim]: what was normalised */
    float eps;
    uint32_t rows;
    uint32_t heads;
    uint32_t head_dim;
} RopeBackwardArgs;

/* For a = silu(g) * u: g and u become their gradients, and dots[index[i]] += d_act[i] . a[i]. A block a row. */
typedef struct SwiGluBackwardArgs {
    const float *d_act; /* [rows, width] */
    float *gate;        /* [rows, width]: g, then its gradient */
    float *up;
    const uint32_t *index; /* [rows], or null: no dots */
    float *dots;           /* [*] */
    uint32_t width;
} SwiGluBackwardArgs;

/* out[index[i]] += a[i] . b[i] + c[index[i]] . bias. A block a row. */
typedef struct RowDotsArgs {
    const float *a; /* [rows, width], width may be 0 */
    const float *b;
    const uint32_t *index; /* [rows] */
    const float *c;        /* [*, bias_width] */
    const float *bias;     /* [bias_width], or null */
    float *out;            /* [*] */
    uint32_t width;
    uint32_t bias_width;
} RowDotsArgs;

/* Rows whose gradients a block of gate_partial adds up. */
#define GATE_ROWS 32

/* Three launches, so that all sums have one order: gate_slopes makes d_logit of d_mask, a block a sequence, or a thread a
 * row; gate_partial adds up d_logit * h of GATE_ROWS rows, a thread a column; gate_sum adds these up to d_router. */
typedef struct GateBackwardArgs {
    const uint32_t *sequences; /* [seqs + 1], or null: every row has its own score */
    const float *logits;       /* [rows] */
    float *d_mask;             /* [rows] */
    const float *h;            /* [rows, width] */
    float *partial;            /* [ceil(rows / GATE_ROWS), width] */
    float *d_router;           /* [width] */
    float penalty;
    uint32_t rows;
    uint32_t width;
} GateBackwardArgs;

/* skinny_gemm.cu: few rows through weights that are streamed once. */

/* One product: out[i] = src[..]. weight^T + bias. */
typedef struct Product {
    const void *weight; /* [n, k] */
    const float *bias;  /* [n], or null */
    void *out;          /* [rows, n], or the residual stream [*, n] */
    uint32_t n;
    uint32_t set; /* which of the row sets */
} Product;

typedef struct SkinnyArgs {
    const void *src; /* [*, k] */
    uint32_t k;
    uint32_t base; /* gathering: source row i is src[index[i] - base] */
    RowSet rows[2]; /* index null: there is none */
    Product of[3];
    uint64_t *best; /* of logits: see SampleArgs, or null */
    WorkCount *work; /* or null */
} SkinnyArgs;

#endif
