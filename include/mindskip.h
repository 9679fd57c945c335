/*
 * mindskip: a transformer runtime whose depth is dynamic, from C.
 *
 * Status     Every function that can fail returns a mindskip_status. mindskip_error() has the text of the last failure on
 *            the calling thread: the cause, the file and what to do next. A call that fails changes nothing else than what
 *            its function says. No panic of the library reaches the caller: it becomes MINDSKIP_ERROR_PANIC.
 *
 * Handles    Models, routers, engines, samplers and batches are handles: numbers that only look like pointers, and are never used
 *            twice. NULL, one that was freed and one of another kind are refused with MINDSKIP_ERROR_HANDLE. Each has a function
 *            that frees it, in any order: what an engine needs of its model lives as long as the engine. NULL may be freed.
 *
 * Structs    Clear all of a struct (memset) and set `size`, its first field, to its sizeof. Zero in every other field of one
 *            that goes in is its default. mindskip_message and mindskip_prompt have no size and stay as they are. Fields will be
 *            added at the end; a library that is older than the header refuses fields that it does not know, unless they are zero.
 *
 * Text       is UTF-8. What goes in ends with NUL. What comes out goes into a buffer of the caller, with a NUL behind it:
 *            of `capacity` bytes, the NUL included; `*length` becomes the bytes of the text without it. Where it does not fit,
 *            nothing is written but `*length`, and MINDSKIP_ERROR_SPACE says so: call again with `*length + 1` bytes. Lists of
 *            numbers go the same way, without a NUL.
 *
 * Memory     What goes in is read during the call and not kept, and does not overlap with what comes out. What a returned
 *            pointer points to belongs to the library and stays as long as its function says.
 *
 * Threads    All functions may be called from any thread. Models and routers may be used by several threads at once. An
 *            engine, a sampler or a batch serves one call at a time: a second one, from another thread or from within a callback,
 *            is refused with MINDSKIP_ERROR_BUSY. An engine computes with threads of its own. Callbacks run on the thread that
 *            called; they must return: neither longjmp nor a C++ exception may leave them.
 */
#ifndef MINDSKIP_H
#define MINDSKIP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library that this header belongs to. */
#define MINDSKIP_VERSION_MAJOR 0
#define MINDSKIP_VERSION_MINOR 1
#define MINDSKIP_VERSION_PATCH 0

/* Changes when a program that was compiled before must be compiled again. */
#define MINDSKIP_ABI_VERSION 1

/* ---- Status ------------------------------------------------------------------------------------------------------- */

typedef int32_t mindskip_status;

enum {
    MINDSKIP_OK = 0,
    /* A file could not be read, mapped or downloaded. */
    MINDSKIP_ERROR_IO = 1,
    /* The content of a file is broken. */
    MINDSKIP_ERROR_FORMAT = 2,
    /* Well-formed, but nothing that this library runs; or what this build was made without. */
    MINDSKIP_ERROR_UNSUPPORTED = 3,
    /* An argument is out of range, NULL, misaligned or not UTF-8. */
    MINDSKIP_ERROR_ARGUMENT = 4,
    /* Shapes or dtypes do not fit together. */
    MINDSKIP_ERROR_SHAPE = 5,
    /* It does not fit into the memory that may be used, or all sequences are open. */
    MINDSKIP_ERROR_MEMORY = 6,
    /* A NaN or an infinity where a number is needed. */
    MINDSKIP_ERROR_NUMERIC = 7,
    /* Routers of another model. */
    MINDSKIP_ERROR_MISMATCH = 8,
    /* A GPU, its driver or one of its libraries failed. */
    MINDSKIP_ERROR_DEVICE = 9,
    /* The work was broken off before it had a result. */
    MINDSKIP_ERROR_INTERRUPTED = 10,
    /* A handle that is NULL, was freed or given away, or is of another kind. */
    MINDSKIP_ERROR_HANDLE = 11,
    /* The engine, the sampler or the batch is in another call. */
    MINDSKIP_ERROR_BUSY = 12,
    /* The buffer is too small; the length that is needed was written. */
    MINDSKIP_ERROR_SPACE = 13,
    /* A bug of the library: please report the text. An engine, sampler or batch that was at work can only be freed. */
    MINDSKIP_ERROR_PANIC = 14,
    /* A failure that this header does not know. */
    MINDSKIP_ERROR_OTHER = 15
};

/* MINDSKIP_ABI_VERSION of the library that runs. Compare it with the header's before anything else. */
uint32_t mindskip_abi_version(void);

/* "0.1.0"; for ever. */
const char *mindskip_version(void);

/* What the last call that failed on this thread said, on one line; "" when none has. Until the next one that fails on this
 * thread, or its end. */
const char *mindskip_error(void);

/* ---- Models -------------------------------------------------------------------------------------------------------- */

/* The files of a model: configuration, weights (mapped, not read), tokenizer, chat template. */
typedef struct mindskip_model mindskip_model;

/* `name`: the folder of a Hugging Face model; "stories", the small model inside the library; or an id on the hub, org/name
 * or org/name@revision, downloaded into the ordinary hub cache when need be. */
mindskip_status mindskip_model_load(const char *name, mindskip_model **model);
mindskip_status mindskip_model_free(mindskip_model *model);

typedef struct mindskip_model_info {
    size_t size;
    size_t layers;
    size_t hidden;
    size_t heads;
    size_t kv_heads;
    size_t head_dim;
    /* Logits for each position; token ids are below it. */
    size_t vocab;
    /* Tokens that the model was made for. */
    size_t context;
    uint64_t parameters;
    /* Of all files of weights, as they are stored. */
    uint64_t weight_bytes;
    /* The tokens that end a text: `eos_count` of them, until the model is freed. */
    const uint32_t *eos;
    size_t eos_count;
    /* 0 or 1: it comes with routers; it has a chat template. */
    int32_t has_routers;
    int32_t has_chat_template;
} mindskip_model_info;

mindskip_status mindskip_model_get_info(mindskip_model *model, mindskip_model_info *info);

/* The ids of a text. `add_special`, 0 or not: with what the tokenizer puts around texts, such as a first token. */
mindskip_status mindskip_tokenize(mindskip_model *model, const char *text, int32_t add_special, uint32_t *ids,
                                  size_t capacity, size_t *length);

/* The text of ids. `skip_special`, 0 or not: without special tokens. Bytes that are no text become U+FFFD. */
mindskip_status mindskip_detokenize(mindskip_model *model, const uint32_t *ids, size_t count, int32_t skip_special,
                                    char *text, size_t capacity, size_t *length);

typedef struct mindskip_message {
    /* "system", "user", "assistant", or what else the template knows. */
    const char *role;
    const char *content;
} mindskip_message;

/* A conversation as the text that the model was trained on; `add_prompt`, 0 or not: with the beginning of an answer. The
 * template writes the special tokens itself: tokenize the text without them. UNSUPPORTED for a model without a template. */
mindskip_status mindskip_chat(mindskip_model *model, const mindskip_message *messages, size_t count, int32_t add_prompt,
                              char *text, size_t capacity, size_t *length);

/* ---- Routers ------------------------------------------------------------------------------------------------------- */

/* Trained routers, and how they are used. */
typedef struct mindskip_routers mindskip_routers;

/* What is to be otherwise than the router file says. The words are those of the command line. */
typedef struct mindskip_routing {
    size_t size;
    /* What is skipped, and what decides: "attn_token", "attn_sequence", "mlp_token", "mlp_sequence", "block_token",
     * "block_sequence". */
    const char *granularity;
    /* Whose K/V a routed layer holds, at token level: "all", or "active", which saves memory. */
    const char *keys;
    /* How scores decide: "threshold", or "topk" of each prompt. */
    const char *select;
    /* The layers to route, of those that have routers: "last:N", "all", "3-9", "1,2,5". */
    const char *layers;
    /* Active from this score on, (0, 1]. At 1e-30 all is active whose logit is above -69. */
    float threshold;
    /* The share that "topk" takes, (0, 1]. */
    float capacity;
} mindskip_routing;

/* `path`: a safetensors file, or a folder as the Router-Tuning code saves it; NULL: the routers that the model comes with.
 * `routing` may be NULL. MISMATCH for routers of another model. */
mindskip_status mindskip_routers_load(mindskip_model *model, const char *path, const mindskip_routing *routing,
                                      mindskip_routers **routers);
mindskip_status mindskip_routers_free(mindskip_routers *routers);

/* ---- Engines ------------------------------------------------------------------------------------------------------- */

/* A model ready to run, with the memory for its sequences. */
typedef struct mindskip_engine mindskip_engine;

typedef struct mindskip_options {
    size_t size;
    /* "cpu", "cuda", "cuda:N"; or "auto", the default: the first GPU when there is one and this build has kernels. */
    const char *device;
    /* On a GPU, of weights and activations: "f32", "f16", "bf16"; default: as the model is stored. */
    const char *dtype;
    /* Of K/V; default: that of the activations, which is f32 on the CPU. */
    const char *kv_dtype;
    /* On a GPU: "auto", "sm80", "hopper". */
    const char *kernels;
    /* On the CPU, what bf16 weights are multiplied with: "f32", the default, or "bf16". */
    const char *precision;
    /* What weights, activations and K/V may take together, such as "8G" or "90%"; default: what the device has free. */
    const char *memory;
    /* CPU threads; default: one for every core that this process may use. */
    size_t threads;
    /* Tokens of a sequence, prompt and answer together; default: what the model was made for, at most 4096. */
    size_t context;
    /* Sequences open at a time; default: 1. */
    size_t batch;
    /* Tokens of one prefill, all prompts together; default: `context`. */
    size_t rows;
    /* Rows that go through a layer at a time in prefill; default: as many as suit the device. */
    size_t chunk;
    /* Tokens whose K/V are held at a time, of all sequences together, when none is skipped; default: `batch` whole contexts. */
    size_t kv_tokens;
} mindskip_options;

/* `routers` may be NULL: the dense model. `options` may be NULL. MEMORY, with the sizes, when it does not fit; nothing is
 * allocated then. */
mindskip_status mindskip_engine_new(mindskip_model *model, mindskip_routers *routers, const mindskip_options *options,
                                    mindskip_engine **engine);
mindskip_status mindskip_engine_free(mindskip_engine *engine);

/* Routes otherwise from here on; NULL: not at all. ARGUMENT while a sequence is open, and for more layers than the engine
 * was made with; MISMATCH for routers of another model. After another failure the engine may be dense. */
mindskip_status mindskip_engine_route(mindskip_engine *engine, mindskip_routers *routers);

/* What it runs on, for people: "cpu, 2 threads, avx2". */
mindskip_status mindskip_engine_device(mindskip_engine *engine, char *text, size_t capacity, size_t *length);

/* What a run takes, in bytes. */
typedef struct mindskip_plan {
    size_t size;
    uint64_t total;
    uint64_t weights;
    uint64_t activations;
    /* The pool of K/V: `kv_pages` pages of 64 rows, `kv_page_bytes` each, shared by all layers and sequences. */
    uint64_t kv;
    uint64_t kv_pages;
    uint64_t kv_page_bytes;
    /* What may be used; UINT64_MAX when that is not known. */
    uint64_t available;
    /* The options as they came out. */
    size_t context;
    size_t batch;
    size_t rows;
    size_t chunk;
} mindskip_plan;

/* The memory that an engine would take, without making it: as numbers, `plan`, and for people, `text`. Either may be NULL,
 * with `length` for the text; `plan` is written even where the text does not fit. Arguments and failures as of
 * mindskip_engine_new. */
mindskip_status mindskip_plan_for(mindskip_model *model, mindskip_routers *routers, const mindskip_options *options,
                                  mindskip_plan *plan, char *text, size_t capacity, size_t *length);

/* The same of an engine. */
mindskip_status mindskip_engine_plan(mindskip_engine *engine, mindskip_plan *plan, char *text, size_t capacity,
                                     size_t *length);

/* ---- Sequences ------------------------------------------------------------------------------------------------------ */

/* A sequence of an engine: a number that no other sequence of any engine gets. 0 is none. */
typedef uint64_t mindskip_seq;

/* MEMORY when `batch` sequences are open. */
mindskip_status mindskip_seq_open(mindskip_engine *engine, mindskip_seq *seq);

/* Gives its memory back. ARGUMENT for one that is not open. */
mindskip_status mindskip_seq_close(mindskip_engine *engine, mindskip_seq seq);

/* Tokens that it holds. */
mindskip_status mindskip_seq_position(mindskip_engine *engine, mindskip_seq seq, size_t *position);

typedef struct mindskip_prompt {
    mindskip_seq seq;
    /* [count], at least one */
    const uint32_t *tokens;
    size_t count;
} mindskip_prompt;

/* Reads `count` prompts, or more of them: tokens follow what their sequence holds. `*logits` becomes [count, vocab],
 * row-major: those behind the last token of each prompt, until the next call with the engine. `logits` may be NULL;
 * `*logits` is NULL after a failure.
 *
 * ARGUMENT for an empty prompt, an id beyond the vocabulary, a sequence that is closed or occurs twice, more tokens than the
 * context or `rows`; MEMORY when the K/V pool is full; NUMERIC for logits that are not numbers. The sequences are as before
 * then. */
mindskip_status mindskip_prefill(mindskip_engine *engine, const mindskip_prompt *prompts, size_t count,
                                 const float **logits);

/* Appends tokens[i] to seqs[i], for `count` sequences in one step. Logits and failures as of mindskip_prefill. */
mindskip_status mindskip_decode(mindskip_engine *engine, const mindskip_seq *seqs, const uint32_t *tokens, size_t count,
                                const float **logits);

/* After a prefill: logprobs[i] becomes the natural log-probability of targets[i] behind row rows[i] of that prefill. Its rows
 * are the tokens of its prompts, those of one prompt after those of the other. NULL for `rows`: 0, 1, 2, and so on. */
mindskip_status mindskip_logprobs(mindskip_engine *engine, const uint32_t *rows, const uint32_t *targets, size_t count,
                                  float *logprobs);

/* ---- Sampling ------------------------------------------------------------------------------------------------------- */

/* How tokens are chosen: the order and the rules are those of transformers. All zero: the best token, always. */
typedef struct mindskip_sampling {
    size_t size;
    /* Logits are divided by it; 0: the best token, always. */
    float temperature;
    /* Only the best tokens that together have this probability; 0: all. */
    float top_p;
    /* Only tokens at least this probable relative to the best. */
    float min_p;
    /* Above 1, tokens that occurred become less likely; 0: 1. */
    float repetition_penalty;
    /* Only the k best tokens; 0: all. */
    size_t top_k;
    uint64_t seed;
    /* Sequences that sample with one seed have different numbers here, such as 0, 1, 2. */
    uint64_t sequence;
} mindskip_sampling;

/* What generation_config.json asks for; greedy where there is none. */
mindskip_status mindskip_model_sampling(mindskip_model *model, mindskip_sampling *sampling);

/* The random numbers of a sequence. */
typedef struct mindskip_sampler mindskip_sampler;

mindskip_status mindskip_sampler_new(const mindskip_sampling *sampling, mindskip_sampler **sampler);
mindskip_status mindskip_sampler_free(mindskip_sampler *sampler);

/* The token after `history`, prompt and answer so far, which the repetition penalty counts and nothing else. `logits`:
 * [vocab]. */
mindskip_status mindskip_sample(mindskip_sampler *sampler, const float *logits, size_t vocab, const uint32_t *history,
                                size_t count, uint32_t *token);

/* ---- Generation ----------------------------------------------------------------------------------------------------- */

/* What one sequence is asked for. It stays open: a further turn goes on from there. */
typedef struct mindskip_turn {
    size_t size;
    mindskip_seq seq;
    /* [prompt_count], at least one: tokens to read first */
    const uint32_t *prompt;
    size_t prompt_count;
    /* [history_count]: tokens that the sequence had read before, for the repetition penalty */
    const uint32_t *history;
    size_t history_count;
    /* NULL: greedy. One of its own for each turn of a call. */
    mindskip_sampler *sampler;
    /* Tokens to make at most; 0: until the context is full. */
    size_t max_tokens;
    /* [eos_count]: tokens that end the answer; NULL: those of the model. None: an address and a count of 0. */
    const uint32_t *eos;
    size_t eos_count;
    /* [stop_count]: texts that end the answer; it is cut off before the first of them. */
    const char *const *stop;
    size_t stop_count;
} mindskip_turn;

enum {
    /* The model ended it. */
    MINDSKIP_FINISH_EOS = 0,
    /* A stop text. */
    MINDSKIP_FINISH_STOP = 1,
    /* As many tokens as were asked for. */
    MINDSKIP_FINISH_LENGTH = 2,
    /* The context is full. */
    MINDSKIP_FINISH_CONTEXT = 3,
    /* The callback broke off, or the request was cancelled. */
    MINDSKIP_FINISH_INTERRUPTED = 4
};

/* What became of a turn. Text and tokens: until the next call with the engine. */
typedef struct mindskip_answer {
    size_t size;
    /* `text_length` bytes and a NUL */
    const char *text;
    size_t text_length;
    /* [token_count]: the tokens that were made, without the one that ended it */
    const uint32_t *tokens;
    size_t token_count;
    /* How many of them the sequence has read: all but the last, unless it was ended. */
    size_t read;
    /* MINDSKIP_FINISH_... */
    int32_t finish;
} mindskip_answer;

/* Called once for every token of every turn, with the text that became certain by it: `length` bytes and a NUL, often one
 * word, sometimes none; whole characters, nothing of a stop text. Returns 0 to go on; anything else ends the generation with
 * what was made, and it is not called again. */
typedef int32_t (*mindskip_on_text)(void *user, size_t turn, const char *text, size_t length);

/* Reads all prompts in one prefill, then decodes all sequences together until each has come to its end. `on_text` may be
 * NULL; `user` is handed to it. `answers`: [count], `size` set in each; may be NULL.
 *
 * Failures as of mindskip_prefill, but those of a later step find the sequences with what was read until then
 * (mindskip_seq_position), and there are no answers. */
mindskip_status mindskip_generate(mindskip_engine *engine, const mindskip_turn *turns, size_t count,
                                  mindskip_on_text on_text, void *user, mindskip_answer *answers);

/* ---- Batches --------------------------------------------------------------------------------------------------------- */

/* Requests of any length that share an engine: each begins when there is room for it, oldest first, and leaves when it has ended
 * (continuous batching). When K/V pages run out, the youngest gives its own back, waits, and begins again unseen. On the CPU each
 * gets the text that mindskip_generate makes of it alone. A server submits what has arrived, steps, and so on: other threads hand
 * it what they want between steps. */
typedef struct mindskip_batch mindskip_batch;

/* Takes the engine over: its handle is refused from here on (HANDLE), and it goes with the batch. `options.batch` is how many
 * requests run at a time, `rows` how many tokens of prompts a step reads, `kv_tokens` how much K/V they share. `queue`: requests
 * that may wait; 0: 1024. ARGUMENT while a sequence is open; the engine stays the caller's after a failure. */
mindskip_status mindskip_batch_new(mindskip_engine *engine, size_t queue, mindskip_batch **batch);

/* Requests that have not ended go with it, unreported. */
mindskip_status mindskip_batch_free(mindskip_batch *batch);

/* A request of a batch: a number that no other request of any batch gets. 0 is none. */
typedef uint64_t mindskip_request;

/* Takes a request; it begins in a later step. `turn` as of mindskip_generate, but for `seq` and `history_count`, which are 0: the
 * batch opens a sequence. A sampler is copied: it may be used otherwise, or freed, at once.
 *
 * ARGUMENT for one that cannot run at all, as of mindskip_prefill; a prompt may be longer than `rows`, to be read in several
 * steps, unless it is decided as a whole ("..._sequence", "topk"). MEMORY while as many wait as may. */
mindskip_status mindskip_batch_submit(mindskip_batch *batch, const mindskip_turn *turn, mindskip_request *request);

/* Ends a request where it is, waiting or running: the next step reports what was made. ARGUMENT for one whose end was
 * reported. */
mindskip_status mindskip_batch_cancel(mindskip_batch *batch, mindskip_request request);

enum {
    /* A piece of its text that is certain, never empty: whole characters, nothing of a stop text. */
    MINDSKIP_EVENT_TEXT = 0,
    /* It has ended. */
    MINDSKIP_EVENT_DONE = 1,
    /* It cannot go on, which is no matter of the others: MEMORY when it does not fit into the K/V pool by itself, NUMERIC when
     * its logits are not numbers, FORMAT when its tokens are no text. */
    MINDSKIP_EVENT_FAILED = 2
};

/* What became of a request in a step. What it points to: until the callback returns. */
typedef struct mindskip_event {
    /* What the library knows of this struct; it may be more than the header does. */
    size_t size;
    mindskip_request request;
    /* MINDSKIP_EVENT_... */
    int32_t kind;
    /* FAILED: why; else MINDSKIP_OK. */
    mindskip_status status;
    /* TEXT: the piece. FAILED: what mindskip_error() would say. `text_length` bytes and a NUL. */
    const char *text;
    size_t text_length;
    /* DONE: what became of it, its pieces joined; else NULL. */
    const mindskip_answer *answer;
} mindskip_event;

/* Returns 0 to go on; anything else cancels the request, whose end the next step reports unless this one does. */
typedef int32_t (*mindskip_on_event)(void *user, const mindskip_event *event);

/* Takes a token for every request that runs and lets as many begin as there is room for; then `on_event` is called for what
 * became of them. `*left` becomes the number of requests whose end was not reported yet: at 0 there is nothing to do.
 *
 * Failures are those that are not a single request's, such as DEVICE; nothing is lost, a further step goes on from there. */
mindskip_status mindskip_batch_step(mindskip_batch *batch, mindskip_on_event on_event, void *user, size_t *left);

typedef struct mindskip_batch_info {
    size_t size;
    /* Requests in a sequence, and those that wait for room. */
    size_t running;
    size_t waiting;
    /* Pages of K/V in all, and those that are in use. */
    uint64_t kv_pages;
    uint64_t kv_pages_used;
    /* What the requests that have ended held at their ends, over all layers: rows of K/V, and those that the dense model would
     * have held. */
    uint64_t kv_rows;
    uint64_t kv_dense_rows;
    /* Of all steps: tokens read by prefill and those that went through a decode step, and the time for each. What is read again
     * counts again. */
    uint64_t prompt_tokens;
    uint64_t decoded_tokens;
    double prefill_seconds;
    double decode_seconds;
    /* The share of (token, routed layer) pairs that were active; 1 for a dense engine. */
    double capacity;
} mindskip_batch_info;

mindskip_status mindskip_batch_get_info(mindskip_batch *batch, mindskip_batch_info *info);

/* ---- What was skipped ------------------------------------------------------------------------------------------------ */

typedef struct mindskip_stats {
    size_t size;
    /* Tokens that were processed since the engine was made or its counts were cleared. */
    uint64_t tokens;
    size_t routed_layers;
    /* The share of (token, routed layer) pairs that were active; 1 for a dense engine. */
    double capacity;
    /* Of the sequences that are open, over all layers: rows of K/V held, and those that the dense model would hold. */
    uint64_t kv_rows;
    uint64_t kv_dense_rows;
    /* The same in bytes of whole pages, and what was saved. */
    uint64_t kv_bytes;
    uint64_t kv_dense_bytes;
    uint64_t kv_saved_bytes;
} mindskip_stats;

mindskip_status mindskip_get_stats(mindskip_engine *engine, mindskip_stats *stats);

/* [layers]: the share of tokens that were active in each layer; 1 in a dense one, and before there were any. */
mindskip_status mindskip_layer_capacities(mindskip_engine *engine, double *capacities, size_t layers);

/* Counts anew. Sequences stay as they are. */
mindskip_status mindskip_clear_stats(mindskip_engine *engine);

#ifdef __cplusplus
}
#endif

#endif
