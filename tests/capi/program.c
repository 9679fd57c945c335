/* What tests/capi.rs compiles, as C and as C++, and compares with the engine in Rust: texts go to standard output. */
#include <mindskip.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQS = 3, TOKENS = 24, ROOM = 4096 };

static const char *const PROMPTS[SEQS] = {"Tom had a red ball.", "Once upon a time", "The dog"};

static void fail(int line, const char *what) {
    fprintf(stderr, "program.c:%d: %s; the last error: %s\n", line, what, mindskip_error());
    exit(1);
}

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))
#define OK(call) CHECK((call) == MINDSKIP_OK)
#define FAILS(status, says, call) CHECK((call) == (status) && strstr(mindskip_error(), says))
#define CLEAR(record) (memset(&(record), 0, sizeof(record)), (record).size = sizeof(record))

static size_t tokenize(mindskip_model *model, const char *text, uint32_t *ids) {
    size_t count;
    OK(mindskip_tokenize(model, text, 1, ids, ROOM, &count));
    return count;
}

/* ---- wrong calls */

static void errors(mindskip_model *model) {
    mindskip_model *no_model = NULL, *freed;
    mindskip_routers *routers;
    mindskip_engine *engine = NULL, *other;
    mindskip_model_info info;
    mindskip_options options;
    mindskip_routing routing;
    mindskip_sampling sampling;
    mindskip_sampler *sampler;
    mindskip_message message = {"user", "Hello"};
    mindskip_prompt prompt;
    mindskip_seq seq, stranger, third;
    uint32_t ids[ROOM], id = 1 << 30;
    char text[8];
    const float *logits;
    size_t length;

    CHECK(mindskip_error()[0] == 0);
    FAILS(MINDSKIP_ERROR_ARGUMENT, "is no folder", mindskip_model_load("/absent/folder", &no_model));
    FAILS(MINDSKIP_ERROR_IO, "config.json", mindskip_model_load(".", &no_model));
    CHECK(no_model == NULL);
    FAILS(MINDSKIP_ERROR_ARGUMENT, "name is NULL", mindskip_model_load(NULL, &no_model));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "model is NULL", mindskip_model_load("stories", NULL));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "name is not UTF-8", mindskip_model_load("\xff", &no_model));

    OK(mindskip_model_load("stories", &freed));
    OK(mindskip_model_free(freed));
    FAILS(MINDSKIP_ERROR_HANDLE, "not a model, or freed", mindskip_model_free(freed));
    OK(mindskip_model_free(NULL));
    CLEAR(info);
    FAILS(MINDSKIP_ERROR_HANDLE, "freed", mindskip_model_get_info(freed, &info));
    FAILS(MINDSKIP_ERROR_HANDLE, "NULL", mindskip_model_get_info(NULL, &info));
    info.size = 7;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "info.size is 7", mindskip_model_get_info(model, &info));

    FAILS(MINDSKIP_ERROR_SPACE, "", mindskip_tokenize(model, PROMPTS[0], 1, ids, 1, &length));
    CHECK(length > 1 && length == tokenize(model, PROMPTS[0], ids));
    FAILS(MINDSKIP_ERROR_SPACE, "", mindskip_detokenize(model, ids, length, 1, text, sizeof text, &length));
    CHECK(length == strlen(PROMPTS[0]));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "ids is NULL", mindskip_detokenize(model, NULL, 1, 1, text, sizeof text, &length));
    FAILS(MINDSKIP_ERROR_UNSUPPORTED, "chat template", mindskip_chat(model, &message, 1, 1, text, sizeof text, &length));

    CLEAR(routing);
    FAILS(MINDSKIP_ERROR_IO, "/absent", mindskip_routers_load(model, "/absent", NULL, &routers));
    routing.keys = "some";
    FAILS(MINDSKIP_ERROR_ARGUMENT, "all, active", mindskip_routers_load(model, NULL, &routing, &routers));
    routing.keys = NULL;
    routing.threshold = 2;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "threshold is 2", mindskip_routers_load(model, NULL, &routing, &routers));

    CLEAR(options);
    options.device = "tpu";
    FAILS(MINDSKIP_ERROR_ARGUMENT, "tpu", mindskip_engine_new(model, NULL, &options, &engine));
    options.device = "cpu";
    options.memory = "1K";
    FAILS(MINDSKIP_ERROR_MEMORY, "may be used", mindskip_engine_new(model, NULL, &options, &engine));
    options.memory = NULL;
    options.context = 1 << 30;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "context", mindskip_engine_new(model, NULL, &options, &engine));
    CHECK(engine == NULL);

    options.context = 64;
    OK(mindskip_engine_new(model, NULL, &options, &engine));
    options.batch = 2;
    OK(mindskip_engine_new(model, NULL, &options, &other));
    OK(mindskip_seq_open(engine, &seq));
    FAILS(MINDSKIP_ERROR_MEMORY, "in use", mindskip_seq_open(engine, &third));
    OK(mindskip_seq_open(other, &stranger));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "not open in this engine", mindskip_seq_position(engine, stranger, &length));
    prompt.seq = seq;
    prompt.tokens = &id;
    prompt.count = 1;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "beyond the vocabulary", mindskip_prefill(engine, &prompt, 1, &logits));
    CHECK(logits == NULL);
    FAILS(MINDSKIP_ERROR_ARGUMENT, "without sequences", mindskip_prefill(engine, &prompt, 0, NULL));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "prompts is NULL", mindskip_prefill(engine, NULL, 1, NULL));
    FAILS(MINDSKIP_ERROR_HANDLE, "not an engine", mindskip_prefill((mindskip_engine *)model, &prompt, 1, NULL));
    prompt.count = 0;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "empty", mindskip_prefill(engine, &prompt, 1, NULL));
    OK(mindskip_seq_close(engine, seq));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "not open", mindskip_seq_close(engine, seq));
    OK(mindskip_seq_position(other, stranger, &length));
    CHECK(length == 0);

    CLEAR(sampling);
    sampling.temperature = -1;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "temperature is -1", mindskip_sampler_new(&sampling, &sampler));
    OK(mindskip_engine_free(other));
    OK(mindskip_engine_free(engine));
    FAILS(MINDSKIP_ERROR_HANDLE, "", mindskip_seq_open(engine, &seq));
}

/* ---- generation */

struct Heard {
    mindskip_engine *engine;
    char text[SEQS][ROOM];
    size_t calls, limit;
    mindskip_status busy;
};

static void *meddle(void *heard) {
    struct Heard *h = (struct Heard *)heard;
    mindskip_seq seq;
    CHECK(mindskip_error()[0] == 0); /* of this thread */
    h->busy = mindskip_seq_open(h->engine, &seq);
    CHECK(strstr(mindskip_error(), "in another call"));
    return NULL;
}

static int32_t hear(void *user, size_t turn, const char *text, size_t length) {
    struct Heard *heard = (struct Heard *)user;
    CHECK(strlen(text) == length && turn < SEQS);
    if (heard->calls == 0) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, meddle, heard) == 0 && pthread_join(thread, NULL) == 0);
        CHECK(mindskip_clear_stats(heard->engine) == MINDSKIP_ERROR_BUSY);
    }
    strcat(heard->text[turn], text);
    return ++heard->calls == heard->limit;
}

/* All prompts at once; prints what came of them. */
static void stories(mindskip_model *model, mindskip_engine *engine, const char *title, float temperature) {
    static uint32_t ids[SEQS][ROOM];
    static struct Heard heard;
    mindskip_turn turns[SEQS];
    mindskip_answer answers[SEQS];
    mindskip_sampler *samplers[SEQS];
    mindskip_stats stats;
    double capacities[8];
    size_t i, position;

    memset(&heard, 0, sizeof heard);
    heard.engine = engine;
    OK(mindskip_clear_stats(engine));
    for (i = 0; i < SEQS; i++) {
        mindskip_sampling sampling;
        CLEAR(sampling);
        sampling.temperature = temperature;
        sampling.seed = 7;
        sampling.sequence = i;
        OK(mindskip_sampler_new(&sampling, &samplers[i]));
        CLEAR(turns[i]);
        CLEAR(answers[i]);
        OK(mindskip_seq_open(engine, &turns[i].seq));
        turns[i].prompt = ids[i];
        turns[i].prompt_count = tokenize(model, PROMPTS[i], ids[i]);
        turns[i].sampler = samplers[i];
        turns[i].max_tokens = TOKENS;
    }
    OK(mindskip_generate(engine, turns, SEQS, hear, &heard, answers));
    CHECK(heard.busy == MINDSKIP_ERROR_BUSY && heard.calls >= SEQS && heard.calls <= SEQS * TOKENS);
    for (i = 0; i < SEQS; i++) {
        printf("%s: %s|%s\n", title, PROMPTS[i], answers[i].text);
        CHECK(answers[i].text_length == strlen(answers[i].text) && !strcmp(answers[i].text, heard.text[i]));
        CHECK(answers[i].finish == MINDSKIP_FINISH_LENGTH && answers[i].token_count == TOKENS);
        OK(mindskip_seq_position(engine, turns[i].seq, &position));
        CHECK(position == turns[i].prompt_count + answers[i].read);
        OK(mindskip_sampler_free(samplers[i]));
    }
    CLEAR(stats);
    OK(mindskip_get_stats(engine, &stats));
    OK(mindskip_layer_capacities(engine, capacities, 8));
    CHECK(mindskip_layer_capacities(engine, capacities, 7) == MINDSKIP_ERROR_ARGUMENT);
    CHECK(stats.kv_saved_bytes == stats.kv_dense_bytes - stats.kv_bytes);
    printf("%s: %llu tokens, capacity %.6f, layer 3 %.6f, %llu of %llu rows\n", title, (unsigned long long)stats.tokens,
           stats.capacity, capacities[3], (unsigned long long)stats.kv_rows, (unsigned long long)stats.kv_dense_rows);
    for (i = 0; i < SEQS; i++)
        OK(mindskip_seq_close(engine, turns[i].seq));
}

/* The same by prefill, decode and a greedy sampler, token by token. */
static void steps(mindskip_model *model, mindskip_engine *engine, size_t vocab) {
    static uint32_t ids[SEQS][ROOM];
    mindskip_prompt prompts[SEQS];
    mindskip_seq seqs[SEQS];
    mindskip_sampling greedy;
    mindskip_sampler *sampler;
    uint32_t next[SEQS];
    const float *logits;
    float logprobs[2];
    size_t i, t, length;

    CLEAR(greedy);
    OK(mindskip_sampler_new(&greedy, &sampler));
    for (i = 0; i < SEQS; i++) {
        OK(mindskip_seq_open(engine, &seqs[i]));
        prompts[i].seq = seqs[i];
        prompts[i].tokens = ids[i];
        prompts[i].count = tokenize(model, PROMPTS[i], ids[i]);
    }
    OK(mindskip_prefill(engine, prompts, SEQS, &logits));
    for (t = 0;; t++) {
        for (i = 0; i < SEQS; i++) {
            OK(mindskip_sample(sampler, logits + i * vocab, vocab, NULL, 0, &next[i]));
            ids[i][prompts[i].count + t] = next[i];
        }
        if (t + 1 == TOKENS)
            break;
        OK(mindskip_decode(engine, seqs, next, SEQS, &logits));
    }
    CHECK(mindskip_logprobs(engine, NULL, next, 1, logprobs) == MINDSKIP_ERROR_ARGUMENT);
    for (i = 0; i < SEQS; i++) {
        char text[ROOM];
        OK(mindskip_detokenize(model, ids[i] + prompts[i].count, TOKENS, 1, text, sizeof text, &length));
        printf("steps: %s|%s\n", PROMPTS[i], text);
        OK(mindskip_seq_close(engine, seqs[i]));
    }
    OK(mindskip_sampler_free(sampler));

    OK(mindskip_seq_open(engine, &prompts[0].seq));
    OK(mindskip_prefill(engine, prompts, 1, NULL));
    OK(mindskip_logprobs(engine, NULL, ids[0] + 1, 2, logprobs));
    printf("logprobs: %.5f %.5f\n", logprobs[0], logprobs[1]);
    OK(mindskip_seq_close(engine, prompts[0].seq));
}

/* Ends before the model does: by the callback, and by a text. */
static void stops(mindskip_model *model, mindskip_engine *engine) {
    static uint32_t ids[ROOM];
    static struct Heard heard;
    const char *const stop[] = {"Lily", "ball"};
    mindskip_turn turn;
    mindskip_answer answer;

    memset(&heard, 0, sizeof heard);
    heard.engine = engine;
    heard.limit = 5;
    CLEAR(turn);
    CLEAR(answer);
    OK(mindskip_seq_open(engine, &turn.seq));
    turn.prompt = ids;
    turn.prompt_count = tokenize(model, PROMPTS[1], ids);
    OK(mindskip_generate(engine, &turn, 1, hear, &heard, &answer));
    CHECK(answer.finish == MINDSKIP_FINISH_INTERRUPTED && answer.token_count == 5);
    printf("broken off: %s\n", answer.text);
    OK(mindskip_seq_close(engine, turn.seq));

    OK(mindskip_seq_open(engine, &turn.seq));
    turn.stop = stop;
    turn.stop_count = 2;
    OK(mindskip_generate(engine, &turn, 1, NULL, NULL, &answer));
    CHECK(answer.finish == MINDSKIP_FINISH_STOP && !strstr(answer.text, "Lily"));
    printf("stopped: %s\n", answer.text);
    OK(mindskip_seq_close(engine, turn.seq));
}

/* ---- requests that come and go */

enum { REQUESTS = 6, SLOTS = 2, BROKEN_OFF = 1, TOO_LARGE = 3, NEVER_BEGUN = 4, STOPPED = 5 };

struct Served {
    mindskip_batch *batch;
    mindskip_request requests[REQUESTS];
    char text[REQUESTS][ROOM];
    /* -1 until it ends, -2 when it fails */
    int32_t finish[REQUESTS];
    size_t pieces[REQUESTS];
};

static int32_t on_event(void *user, const mindskip_event *event) {
    struct Served *served = (struct Served *)user;
    size_t i = 0, left;
    while (i < REQUESTS && served->requests[i] != event->request)
        i++;
    CHECK(i < REQUESTS && served->finish[i] == -1 && event->size == sizeof *event);
    CHECK(strlen(event->text) == event->text_length && (event->kind == MINDSKIP_EVENT_DONE) == (event->answer != NULL));
    FAILS(MINDSKIP_ERROR_BUSY, "the batch is in another call", mindskip_batch_step(served->batch, on_event, user, &left));
    if (event->kind == MINDSKIP_EVENT_TEXT) {
        CHECK(event->status == MINDSKIP_OK && event->text_length > 0);
        strcat(served->text[i], event->text);
        return i == BROKEN_OFF && ++served->pieces[i] == 5;
    }
    if (event->kind == MINDSKIP_EVENT_FAILED) {
        CHECK(i == TOO_LARGE && event->status == MINDSKIP_ERROR_MEMORY && strstr(event->text, "KV cache"));
        served->finish[i] = -2;
        return 0;
    }
    CHECK(event->status == MINDSKIP_OK && event->answer->size == sizeof *event->answer);
    CHECK(!strcmp(event->answer->text, served->text[i]) && event->answer->text_length == strlen(served->text[i]));
    served->finish[i] = event->answer->finish;
    return 0;
}

/* More requests than slots, of different lengths; two are cancelled and one does not fit. Each has the text that it has alone. */
static void serve(mindskip_model *model, mindskip_routers *routers) {
    static uint32_t ids[REQUESTS][ROOM];
    static struct Served served;
    const char *const stop[] = {"Lily", "ball"};
    const uint32_t no_eos = 0;
    mindskip_turn turns[REQUESTS], wrong;
    mindskip_options options;
    mindskip_batch_info info;
    mindskip_engine *engine, *lone;
    mindskip_seq seq;
    mindskip_request request;
    size_t i, left, steps = 0;

    memset(&served, 0, sizeof served);
    CLEAR(options);
    options.device = "cpu";
    options.context = 160;
    OK(mindskip_engine_new(model, routers, &options, &lone));
    options.batch = SLOTS;
    options.kv_tokens = 128;
    options.rows = 8;
    OK(mindskip_engine_new(model, routers, &options, &engine));
    OK(mindskip_seq_open(engine, &seq));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "sequences are open", mindskip_batch_new(engine, 0, &served.batch));
    OK(mindskip_seq_close(engine, seq));
    OK(mindskip_batch_new(engine, REQUESTS, &served.batch));
    FAILS(MINDSKIP_ERROR_HANDLE, "given to a batch", mindskip_seq_open(engine, &seq));
    FAILS(MINDSKIP_ERROR_HANDLE, "given to a batch", mindskip_engine_free(engine));

    for (i = 0; i < REQUESTS; i++) {
        mindskip_sampling sampling;
        CLEAR(sampling);
        sampling.temperature = i % 2 ? 0.8f : 0;
        sampling.seed = i;
        CLEAR(turns[i]);
        turns[i].prompt = ids[i];
        turns[i].prompt_count = tokenize(model, PROMPTS[i % SEQS], ids[i]);
        turns[i].max_tokens = 8 * (i + 1);
        if (i == TOO_LARGE) {
            turns[i].max_tokens = 0;
            turns[i].eos = &no_eos;
        }
        if (i == STOPPED) {
            turns[i].max_tokens = 100;
            turns[i].stop = stop;
            turns[i].stop_count = 2;
        }
        OK(mindskip_sampler_new(&sampling, &turns[i].sampler));
        OK(mindskip_batch_submit(served.batch, &turns[i], &served.requests[i]));
        served.finish[i] = -1;
    }
    FAILS(MINDSKIP_ERROR_MEMORY, "are waiting", mindskip_batch_submit(served.batch, &turns[0], &request));
    wrong = turns[0];
    wrong.seq = 1;
    FAILS(MINDSKIP_ERROR_ARGUMENT, "opens its sequences", mindskip_batch_submit(served.batch, &wrong, &request));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "on_event is NULL", mindskip_batch_step(served.batch, NULL, NULL, &left));
    FAILS(MINDSKIP_ERROR_ARGUMENT, "not of this batch", mindskip_batch_cancel(served.batch, 0));

    OK(mindskip_batch_cancel(served.batch, served.requests[NEVER_BEGUN]));
    do {
        OK(mindskip_batch_step(served.batch, on_event, &served, &left));
        CLEAR(info);
        OK(mindskip_batch_get_info(served.batch, &info));
        CHECK(info.running <= SLOTS && info.running + info.waiting <= left && info.kv_pages_used <= info.kv_pages);
        CHECK(++steps < 1000);
    } while (left > 0);
    CHECK(info.running == 0 && info.kv_pages_used == 0 && info.kv_rows <= info.kv_dense_rows && info.kv_rows > 0);
    CHECK(info.prompt_tokens > 20 && info.decoded_tokens > 40 && info.prefill_seconds > 0 && info.decode_seconds > 0);
    CHECK(routers ? info.capacity > 0 && info.capacity < 1 : info.capacity == 1);
    FAILS(MINDSKIP_ERROR_ARGUMENT, "has ended", mindskip_batch_cancel(served.batch, served.requests[0]));

    for (i = 0; i < REQUESTS; i++) {
        mindskip_answer answer;
        mindskip_sampling sampling;
        CLEAR(answer);
        CLEAR(sampling);
        sampling.temperature = i % 2 ? 0.8f : 0;
        sampling.seed = i;
        OK(mindskip_sampler_free(turns[i].sampler));
        OK(mindskip_sampler_new(&sampling, &turns[i].sampler));
        OK(mindskip_seq_open(lone, &turns[i].seq));
        OK(mindskip_generate(lone, &turns[i], 1, NULL, NULL, &answer));
        if (i == BROKEN_OFF || i == TOO_LARGE || i == NEVER_BEGUN) {
            CHECK(!strncmp(answer.text, served.text[i], strlen(served.text[i])));
            CHECK(served.finish[i] == (i == TOO_LARGE ? -2 : MINDSKIP_FINISH_INTERRUPTED));
            CHECK((served.text[i][0] == 0) == (i == NEVER_BEGUN));
        } else {
            CHECK(!strcmp(answer.text, served.text[i]) && answer.finish == served.finish[i]);
        }
        OK(mindskip_seq_close(lone, turns[i].seq));
        OK(mindskip_sampler_free(turns[i].sampler));
    }
    OK(mindskip_batch_free(served.batch));
    FAILS(MINDSKIP_ERROR_HANDLE, "not a batch, or freed", mindskip_batch_free(served.batch));
    OK(mindskip_engine_free(lone));
}

int main(void) {
    mindskip_model *model;
    mindskip_routers *routers;
    mindskip_engine *engine;
    mindskip_model_info info;
    mindskip_options options;
    mindskip_routing routing;
    mindskip_plan plan, planned;
    char text[ROOM];
    size_t length;

    CHECK(mindskip_abi_version() == MINDSKIP_ABI_VERSION);
    OK(mindskip_model_load("stories", &model));
    errors(model);

    CLEAR(info);
    OK(mindskip_model_get_info(model, &info));
    CHECK(info.layers == 8 && info.eos_count == 1 && info.has_routers == 1 && info.has_chat_template == 0);
    CLEAR(routing);
    routing.keys = "active";
    routing.threshold = 0.4f;
    routing.layers = "3,5-6";
    OK(mindskip_routers_load(model, NULL, &routing, &routers));

    CLEAR(options);
    options.device = "cpu";
    options.batch = SEQS;
    options.context = 128;
    CLEAR(plan);
    OK(mindskip_plan_for(model, routers, &options, &plan, text, sizeof text, &length));
    CHECK(plan.total == plan.weights + plan.activations + plan.kv && plan.batch == SEQS && strstr(text, "K/V"));
    OK(mindskip_engine_new(model, routers, &options, &engine));
    CLEAR(planned);
    OK(mindskip_engine_plan(engine, &planned, NULL, 0, NULL));
    CHECK(planned.total == plan.total && planned.kv == plan.kv);
    OK(mindskip_engine_device(engine, text, sizeof text, &length));
    CHECK(!strncmp(text, "cpu", 3));

    stories(model, engine, "routed", 0);
    stories(model, engine, "drawn", 0.8f);
    OK(mindskip_engine_route(engine, NULL));
    stories(model, engine, "dense", 0);
    steps(model, engine, info.vocab);
    stops(model, engine);
    serve(model, NULL);
    serve(model, routers);

    /* In any order. */
    OK(mindskip_model_free(model));
    OK(mindskip_routers_free(routers));
    OK(mindskip_engine_free(engine));
    return 0;
}
