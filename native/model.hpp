// One decoder with its weights, KV arena and scratch: a step is one call.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "lowrank.hpp"
#include "pack.hpp"
#include "pool.hpp"

namespace galley {

struct Shape {
    int layers, hidden, ffn, heads, kv_heads, head_dim, vocab;
    float rms_eps;
    double rope_base, rope_scale;
    int rope_dim;
    bool rope_interleaved, qkv_bias, qk_norm;
    std::vector<float> rope_factors;  // empty or rope_dim / 2
    int q_rows() const { return heads * head_dim; }
    int kv_rows() const { return kv_heads * head_dim; }
};

struct Tensor {
    Type type;
    int rows, cols;
    const uint8_t* data;
};
using Tensors = std::map<std::string, Tensor>;

// The flat arrays of one step (runtime/plan.py, Rows).
struct Step {
    const int32_t *tokens, *seq_start, *context, *blocks, *block_start, *out, *states;
    const int32_t* adapters;  // slot of each sequence, -1 for none; those past the end have none
    int count, sequences, block_count, outputs, state_count, adapter_count;
};

// The flat arrays of one sampling call (runtime/plan.py, Draws).
struct DrawArrays {
    int rows;
    const float *temperature, *top_p, *min_p, *repetition, *frequency, *presence;
    const int32_t *top_k, *lane, *logprobs, *given;
    const uint64_t* seed;
    const int64_t* position;
    const int32_t *bias_start, *bias_ids, *ban_start, *ban_ids, *seen_start, *seen_ids, *seen_counts;
    const float* bias_values;
    const int32_t* mask_row;
    const uint32_t* masks;
    size_t mask_words;  // in all masks together
};

struct DrawnRow {
    int id = 0, rank = 0;
    float logprob = 0;
    std::vector<std::pair<int, float>> top;
};

// Rows of whole cache lines: a store that straddles two costs double, and two threads would share the line.
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const LineAllocator&) const { return true; }
};
using Floats = std::vector<float, LineAllocator<float>>;

class Model {
   public:
    static constexpr int kAdapterSlots = 1024;
    // Throws std::invalid_argument naming the tensor when one is missing or has the wrong shape or size.
    Model(const Shape& shape, const Tensors& tensors, const Kernels& kernels, int threads, int blocks, Kv kv);

    // Throws std::invalid_argument when an index is out of range; nothing has been written then.
    void step(const Step& s);
    std::vector<DrawnRow> sample(const DrawArrays& d);
    // Puts an adapter's weights into a slot, copied; without tensors, empties it. Between steps. Throws
    // std::invalid_argument for shapes that are not the model's.
    void set_adapter(int slot, const LowRankTensors& tensors);

    const float* logits() const { return logits_.data(); }
    int outputs() const { return outputs_; }
    int logits_stride() const { return vocab_pad_; }
    // Hidden states after the last norm, [state_count][hidden], of the last step.
    const float* states() const { return states_.data(); }
    int state_count() const { return state_count_; }
    const Shape& shape() const { return shape_; }
    int threads() const { return pool_.size(); }
    int blocks() const { return blocks_; }
    const char* isa() const { return k_.name; }
    size_t weight_bytes() const { return weight_bytes_; }
    // One KV block of all layers: `block_bytes` contiguous bytes of the arena. Throws when there is no such block.
    size_t block_bytes() const { return page_bytes(kv_type_, shape_.head_dim) * shape_.kv_heads * shape_.layers; }
    uint8_t* block(int i) const {
        if (i < 0 || i >= blocks_) throw std::invalid_argument("block id outside the arena");
        return kv_->data() + block_bytes() * i;
    }
    size_t kv_bytes_per_token() const { return page_bytes(kv_type_, shape_.head_dim) / kPage * shape_.kv_heads * shape_.layers; }

   private:
    struct Segment {  // a matrix and the first column of the fused output it fills
        Matrix w;
        int offset;
    };
    struct Layer {
        std::vector<Segment> qkv;
        Matrix o, gate, up, down;
        const float *attn_norm, *ffn_norm, *q_norm = nullptr, *k_norm = nullptr;
        const float* bias = nullptr;
    };
    struct Buffers {  // activations of one linear input
        std::vector<Piece> pieces;
        Floats x;
        std::vector<uint8_t, LineAllocator<uint8_t>> room;  // of a thread: Acts::room
        void fit(int tokens, int cols);
    };
    enum Op { kQkv, kOut = kQkv + 3, kFfn, kDown, kOps };  // q, k and v may be three matrices

    // Attention work. A unit is up to kUnitTokens consecutive tokens of one sequence, whose rows share their pages; a task
    // is one or all spans of a unit, or one span that several units of one token have in common.
    struct Unit {
        int seq, token, tokens;
        int spans, part;  // how many; index of its first part where they are computed apart, else -1
    };
    struct Task { int span, first, units; };  // span -1: all of them in turn; `units` entries of members_ from `first`

    const Tensor& need(const Tensors& t, const std::string& name, int rows, int cols) const;
    const float* keep_vector(const Tensors& t, const std::string& name, int n);
    void pack(const Tensors& t);
    void check(const Step& s) const;
    void forward(const Step& s, int thread);
    template <class F>
    void spread(int work, int pairs, const Acts& a, bool quantised, int thread, F f);
    void multiply(const Matrix& w, const Acts& a, int work, float* out, size_t ldo, bool add, int thread);
    void plan_attention(const Step& s);
    void attend(const Step& s, int layer, int thread);
    void attend_task(const Step& s, const Task& task, int layer, int head, int thread);
    void turn_queries(int layer, int token, int head, float* out);
    void write_token(const Step& s, int layer, int token, int head);
    Acts normed(const float* x, const float* weight, int tokens, int thread, bool quantise);
    Acts prepared(const float* x, size_t ldx, int cols, int tokens, int thread, bool quantise);
    uint8_t* page(int layer, int block, int head) const;
    void plan_adapters(const Step& s, const int32_t* const* rows, const int* counts, std::vector<LowRankRun>& runs) const;
    void lower(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, const float* x, size_t ldx, int thread);
    void raise(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, int part, int p0, int p1, int t0, int t1,
               float* out, size_t ldo, size_t pair_stride, bool whole_pairs, int thread);
    void raise_all(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, int part, int rows, int tokens, float* out,
                   size_t ldo, int thread);

    Shape shape_;
    const Kernels& k_;
    Pool pool_;
    int blocks_;
    Kv kv_type_;
    int vocab_pad_;
    size_t weight_bytes_ = 0;
    std::unique_ptr<Arena> weights_, kv_;
    std::vector<std::unique_ptr<std::vector<float>>> vectors_;
    std::vector<Layer> layers_;
    const float* out_norm_ = nullptr;
    Matrix head_;
    Tensor embedding_{};

    // Scratch, grown on demand before a step enters the pool.
    Floats x_, qkv_, att_, h_, xo_, atto_, logits_, states_;
    std::vector<float> cos_, sin_;
    std::vector<double> inv_freq_;
    std::vector<int> seq_of_;
    Buffers shared_;
    std::vector<Buffers> own_;                 // one a thread: small steps quantise redundantly, without a barrier
    std::vector<Floats> tile_, attn_scratch_, draw_scratch_;
    std::vector<Unit> units_;
    std::vector<Task> tasks_;
    std::vector<int> members_;                 // units of the tasks
    std::vector<std::atomic<int>> left_;       // spans not yet computed, [unit][kv head]
    Floats parts_;                             // of units computed span by span, [part][kv head][row]
    int unit_rows_ = 0;
    std::vector<std::atomic<int>> next_;       // attention: work taken, one a layer
    std::vector<std::vector<std::atomic<int>>> taken_;  // linears: work taken of each thread's part, [thread][layer, op]
    std::vector<std::unique_ptr<LowRank>> adapters_;  // by slot
    std::vector<LowRankRun> runs_, last_runs_;        // of this step; of the rows that go on past the last attention
    Floats low_;                                      // [row][low_ld_]
    size_t low_ld_ = 0;
    int outputs_ = 0, state_count_ = 0;
    bool narrow_ = false;                      // some matrix has five or six bits: Acts::room is needed
    bool chunks_ = false;                      // some sequence has several tokens in this step
};

}  // namespace galley
