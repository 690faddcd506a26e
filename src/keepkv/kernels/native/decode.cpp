// Attention of one token over slots that lie in a few bits, or in 16 or 32. Every byte is read once and expanded in
// registers; all that is computed is float32. See __init__.py for how this is built, decode.py for how it is called.
#include <cmath>

#include "tile.h"

extern "C" {

struct Call {
    Vectors keys, values;
    Field votes, positions;          // float32; int32 (type 0) or int64 (1), below 0: empty
    const int64_t *first, *lengths;  // (B,H), of slots; null: every column of a rectangle
    const float* query;              // (B,Hq,D), with the scaling in it
    float *output, *lse;             // (B,Hq,Dv), (B,Hq)
    float* logits;                   // null: nobody asked; strided as follows, slots side by side
    int64_t logits_row, logits_head, logits_query;
    int64_t rows, heads, groups, longest, threads;
    double softcap;  // 0: none
};
}

namespace {

constexpr int CHUNK = 1024;  // slots of a segment that one thread takes; fixed, so that sums do not depend on threads
constexpr int64_t WORTH = 1 << 18;  // multiplications for which another thread is woken

// N ≤ HEADS query heads on their way through the slots of a segment.
struct Heads {
    int n;
    Buffer<F> q, ones, sums, zeros;
    float top[HEADS], total[HEADS];

    void start(int count, const float* query, const Shape& keys, const Shape& values) {
        n = count;
        q.resize((size_t)keys.K * keys.J * n), ones.resize((size_t)keys.K * n);
        sums.resize((size_t)values.K * values.J * n), zeros.resize((size_t)values.K * n);
        std::fill(top, top + HEADS, NONE), std::fill(total, total + HEADS, 0.0f);
        for (int k = 0; k < keys.K; ++k)
            for (int j = 0; j < keys.J; ++j)
                for (int i = 0; i < n; ++i) {
                    F& x = q[(k * keys.J + j) * n + i];
                    for (int w = 0; w < LANES; ++w) {
                        const int at = keys.at[(k * keys.J + j) * LANES + w];
                        x[w] = at < 0 ? 0 : query[i * keys.width + at];
                    }
                    ones[k * n + i] += x;
                }
    }
    // Logits u of a tile to shares e^(u − top), which are 0 behind its last slot.
    void shares(Line* u, int slots, const float* bias, float softcap, const Shape& values, float* logits, int64_t stride) {
        for (int i = 0; i < n; ++i) {
            F most = all(NONE);
            for (int at = 0; at < slots; at += LANES) {
                F x = load<F>(u[i] + at);
                if (softcap) x = softcap * (1.0f - 2.0f / (exponential(x * (2 / softcap)) + 1.0f));
                x += load<F>(bias + at);
                store(u[i] + at, x);
                most = larger(x, most);
            }
            if (logits) std::memcpy(logits + i * stride, u[i], slots * sizeof(float));
            float higher = top[i];
            for (int w = 0; w < LANES; ++w) higher = std::max(higher, most[w]);
            if (higher > top[i]) {
                const float shrink = std::exp(top[i] - higher);
                total[i] *= shrink;
                for (int k = 0; k < values.K; ++k) {
                    zeros[k * n + i] *= shrink;
                    for (int j = 0; j < values.J; ++j) sums[(k * values.J + j) * n + i] *= shrink;
                }
                top[i] = higher;
            }
            const F shift = all(top[i] == NONE ? 0 : top[i]);
            F sum{};
            for (int at = 0; at < slots; at += LANES) {
                const F x = exponential(load<F>(u[i] + at) - shift);
                store(u[i] + at, x);
                sum += x;
            }
            for (int w = 0; w < LANES; ++w) total[i] += sum[w];
        }
    }
    // Of each head: log-sum-exp, then the mean of the values.
    void finish(const Shape& values, float* out) const {
        for (int i = 0; i < n; ++i, out += 1 + values.width) {
            out[0] = total[i] > 0 ? top[i] + std::log(total[i]) : total[i] == 0 ? NONE : total[i];
            std::fill(out + 1, out + 1 + values.width, 0.0f);
            const float share = total[i] == 0 ? 0 : 1 / total[i];
            for (int k = 0; k < values.K; ++k)
                for (int j = 0; j < values.J; ++j) {
                    const F x = (sums[(k * values.J + j) * n + i] + zeros[k * n + i]) * share;
                    for (int w = 0; w < LANES; ++w) {
                        const int at = values.at[(k * values.J + j) * LANES + w];
                        if (at >= 0) out[1 + at] += x[w];
                    }
                }
        }
    }
};

// A chunk of the slots of one segment: for each query head log-sum-exp and output, to ``out`` (groups, 1 + Dv).
void attend(const Call& c, const Shape& ks, const Shape& vs, int64_t segment, int64_t begin, int64_t end, float* out) {
    const int64_t row = segment / c.heads, head = segment % c.heads, first = c.first ? c.first[segment] : 0;
    const int groups = (int)c.groups;
    Tile keys(c.keys, ks), values(c.values, vs);
    const std::unique_ptr<Heads[]> heads(new Heads[(groups + HEADS - 1) / HEADS]);
    for (int g = 0; g < groups; g += HEADS)
        heads[g / HEADS].start(std::min(HEADS, groups - g), c.query + (segment * groups + g) * ks.width, ks, vs);
    alignas(64) float u[HEADS][TILE + LANES] = {}, bias[TILE + LANES];
    for (int64_t slot = first + begin; slot < first + end; slot += TILE) {
        const int n = (int)std::min<int64_t>(TILE, first + end - slot);
        const float* votes = (const float*)c.votes.data + row * c.votes.row + head * c.votes.head + slot;
        for (int i = 0; i < n; ++i) bias[i] = c.votes.data ? votes[i] : 0;
        const int64_t held = row * c.positions.row + head * c.positions.head + slot;
        if (c.positions.data && c.positions.type == 0)
            for (int i = 0; i < n; ++i) bias[i] = ((const int32_t*)c.positions.data)[held + i] < 0 ? NONE : bias[i];
        else if (c.positions.data)
            for (int i = 0; i < n; ++i) bias[i] = ((const int64_t*)c.positions.data)[held + i] < 0 ? NONE : bias[i];
        std::fill(bias + n, bias + TILE + LANES, NONE);
        const bool empty = std::find(bias, bias + n, NONE) != bias + n;
        keys.move(row, head, slot, n, empty ? bias : nullptr);
        values.move(row, head, slot, n, empty ? bias : nullptr);
        float* logits = c.logits ? c.logits + row * c.logits_row + head * c.logits_head + slot : nullptr;
        for (int g = 0; g < groups; g += HEADS) {
            Heads& h = heads[g / HEADS];
            run<Products>(h.n, keys, h.q.at, h.ones.at, u);
            h.shares(u, n, bias, (float)c.softcap, vs, logits ? logits + g * c.logits_query : nullptr, c.logits_query);
            run<Means>(h.n, values, u, h.sums.at, h.zeros.at);
        }
    }
    for (int g = 0; g < groups; g += HEADS) heads[g / HEADS].finish(vs, out + g * (1 + vs.width));
}

// Joins the chunks of a query head in their order: parts (chunks, groups, 1 + Dv) from that head on.
void join(const float* parts, int64_t chunks, int64_t stride, int width, float* lse, float* out) {
    float top = NONE, total = 0;
    for (int64_t i = 0; i < chunks; ++i) top = std::max(top, parts[i * stride]);
    std::fill(out, out + width, 0.0f);
    for (int64_t i = 0; i < chunks; ++i) {
        const float* part = parts + i * stride;
        const float share = part[0] == NONE ? 0 : std::exp(part[0] - top);
        if (share == 0) continue;  // nothing there
        total += share;
        for (int d = 0; d < width; ++d) out[d] += share * part[1 + d];
    }
    *lse = total == 0 ? NONE : top + std::log(total);
    for (int d = 0; d < width && total != 0; ++d) out[d] /= total;
}

}  // namespace

extern "C" void keepkv_decode(const Call* call) {
    const Call& c = *call;
    const Shape keys(c.keys), values(c.values);
    const int64_t segments = c.rows * c.heads, each = c.groups * (1 + values.width);
    Buffer<int64_t> from;  // which chunk is the first of a segment
    from.resize(segments + 1);
    const auto length = [&](int64_t i) { return c.lengths ? c.lengths[i] : c.longest; };
    int64_t slots = 0;
    for (int64_t i = 0; i < segments; ++i) {
        from[i + 1] = from[i] + (length(i) + CHUNK - 1) / CHUNK;
        slots += length(i);
    }
    Buffer<float> parts;
    parts.resize(from[segments] * each);
    const int64_t worth = slots * c.groups * (keys.width + values.width) / WORTH;
    const int threads = (int)std::max<int64_t>(1, std::min(c.threads, worth));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < from[segments]; ++chunk) {
        const int64_t segment = std::upper_bound(from.at, from.at + segments + 1, chunk) - from.at - 1;
        const int64_t begin = (chunk - from[segment]) * CHUNK;
        attend(c, keys, values, segment, begin, std::min<int64_t>(begin + CHUNK, length(segment)), parts.at + chunk * each);
    }
    for (int64_t i = 0; i < segments * c.groups; ++i)
        join(parts.at + from[i / c.groups] * each + i % c.groups * (1 + values.width), from[i / c.groups + 1] - from[i / c.groups],
             each, values.width, c.lse + i, c.output + i * values.width);
}

// Rows that decode side by side: of each the exact slots in contiguous memory, with room behind the used ones; and older
// ones that lie ragged, if there are any.
extern "C" struct Row {
    char *keys, *values;  // (heads,capacity,D), (heads,capacity,Dv)
    float* votes;         // (heads,capacity); null: every slot has one
    int32_t* positions;
    const int64_t* position;  // of the token that is added
    int64_t at, heads, capacity, used, key_width, value_width, key_bits, value_bits;  // at: number among the batch's
    const char *old_keys, *old_values;  // (N,D), (N,Dv)
    const float* old_votes;
    const int64_t *old_first, *old_lengths;  // (heads); null: there are none
    int64_t old_longest, old_total;

    int64_t key() const { return key_width * (key_bits == 32 ? 4 : 2); }  // bytes
    int64_t value() const { return value_width * (value_bits == 32 ? 4 : 2); }
};

namespace {

// A call over the slots with ``keys`` and ``values``, ``apart`` of them from head to head; all else is as in a row alone.
Call call(const Row& r, const char* keys, const char* values, const float* votes, int64_t apart, int64_t query_heads) {
    Call c{};
    c.keys = {{keys, 0, apart * r.key(), r.key_width, 0}, {}, {}, nullptr, r.key_width, r.key_bits};
    c.values = {{values, 0, apart * r.value(), r.value_width, 0}, {}, {}, nullptr, r.value_width, r.value_bits};
    c.votes = {votes, 0, apart, 1, 0};
    c.rows = 1, c.heads = r.heads, c.groups = query_heads / r.heads;
    return c;
}

// Attention over both kinds of slots of a row, joined; ``c`` is the call over the newer ones.
void with_older(const Row& r, const Call& c, int64_t heads) {
    const int64_t width = r.value_width, each = heads * (1 + width);
    Buffer<float> lse, output, parts;
    lse.resize(2 * heads), output.resize(2 * heads * width), parts.resize(2 * each);
    Call newer = c, older = call(r, r.old_keys, r.old_values, r.old_votes, 0, heads);
    older.first = r.old_first, older.lengths = r.old_lengths, older.longest = r.old_longest;
    older.query = c.query, older.softcap = c.softcap, older.threads = c.threads;
    older.lse = lse.at, older.output = output.at, newer.lse = lse.at + heads, newer.output = output.at + heads * width;
    keepkv_decode(&older);
    keepkv_decode(&newer);
    for (int64_t i = 0; i < 2 * heads; ++i) {
        parts[i * (1 + width)] = lse[i];
        std::memcpy(parts.at + i * (1 + width) + 1, output.at + i * width, width * sizeof(float));
    }
    for (int64_t h = 0; h < heads; ++h)
        join(parts.at + h * (1 + width), 2, each, (int)width, c.lse + h, c.output + h * width);
}

}  // namespace

// Adds a token to each of ``rows``. keys, values: of the batch; strides are bytes.
extern "C" void keepkv_append(Row* rows, int64_t count, const char* keys, int64_t key_row, int64_t key_head,
                              const char* values, int64_t value_row, int64_t value_head) {
    for (Row* r = rows; r != rows + count; ++r) {
        for (int64_t head = 0; head < r->heads; ++head) {
            const int64_t slot = head * r->capacity + r->used;
            std::memcpy(r->keys + slot * r->key(), keys + r->at * key_row + head * key_head, r->key());
            std::memcpy(r->values + slot * r->value(), values + r->at * value_row + head * value_head, r->value());
            r->positions[slot] = (int32_t)*r->position;
            if (r->votes) r->votes[slot] = 0;  // the logarithm of one
        }
        ++r->used;
    }
}

// query (B,heads,D) and output (B,heads,Dv) of the batch, contiguous; lse: room for ``heads`` of each of ``rows``.
extern "C" void keepkv_decode_rows(const Row* rows, int64_t count, int64_t heads, const float* query, float* output,
                                   float* lse, int64_t threads, double softcap) {
    int64_t worth = 0;
    for (const Row* r = rows; r != rows + count; ++r)
        worth += (r->used * r->heads + r->old_total) * (heads / r->heads) * (r->key_width + r->value_width);
    const int many = (int)std::max<int64_t>(1, std::min({threads, count, worth / WORTH}));
#pragma omp parallel for schedule(dynamic) num_threads(many) if (many > 1)
    for (int64_t i = 0; i < count; ++i) {
        const Row& r = rows[i];
        Call c = call(r, r.keys, r.values, r.votes, r.capacity, heads);
        c.positions = {r.positions, 0, r.capacity, 1, 0}, c.longest = r.used;
        c.query = query + r.at * heads * r.key_width, c.output = output + r.at * heads * r.value_width;
        c.lse = lse + i * heads, c.softcap = softcap, c.threads = many > 1 ? 1 : threads;
        if (r.old_lengths) with_older(r, c, heads);
        else keepkv_decode(&c);
    }
}
