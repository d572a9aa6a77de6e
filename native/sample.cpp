// One token for each row of a step's logits, and what is told about it.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "model.hpp"
#include "share.hpp"

namespace galley {

std::vector<DrawnRow> Model::sample(const DrawArrays& d) {
    if (d.rows != outputs_) throw std::invalid_argument("sample: rows do not match the last step's outputs");
    const int n = shape_.vocab;
    const auto check = [&](const int32_t* start, const int32_t* ids, const char* what) {
        for (int i = 0; i < start[d.rows]; i++)
            if (ids[i] < 0 || ids[i] >= n) throw std::invalid_argument(std::string("sample: ") + what + " id outside the vocabulary");
    };
    check(d.bias_start, d.bias_ids, "bias"), check(d.ban_start, d.ban_ids, "ban"), check(d.seen_start, d.seen_ids, "seen");
    const size_t words = (n + 31) / 32;
    for (int r = 0; r < d.rows; r++)
        if (d.mask_row[r] >= 0 && (size_t)(d.mask_row[r] + 1) * words > d.mask_words)
            throw std::invalid_argument("sample: a row names a mask that is not there");
    for (int r = 0; r < d.rows; r++)
        if (d.given[r] >= n) throw std::invalid_argument("sample: a given id outside the vocabulary");
    std::vector<DrawnRow> out(d.rows);
    for (auto& s : draw_scratch_) grow(s, (size_t)2 * n + 64);
    const auto row = [&](int r, int thread) {
        const float* x = logits_.data() + (size_t)r * vocab_pad_;
        const Draw one{d.temperature[r], d.top_p[r], d.min_p[r], d.repetition[r], d.frequency[r], d.presence[r], d.top_k[r],
                       d.lane[r], d.seed[r], d.position[r],
                       d.bias_ids + d.bias_start[r], d.bias_values + d.bias_start[r], d.bias_start[r + 1] - d.bias_start[r],
                       d.ban_ids + d.ban_start[r], d.ban_start[r + 1] - d.ban_start[r],
                       d.seen_ids + d.seen_start[r], d.seen_counts + d.seen_start[r], d.seen_start[r + 1] - d.seen_start[r],
                       d.mask_row[r] < 0 ? nullptr : d.masks + (size_t)d.mask_row[r] * words};
        DrawnRow& o = out[r];
        o.id = d.given[r] >= 0 ? d.given[r] : k_.draw(x, n, one, draw_scratch_[thread].data());
        if (d.logprobs[r] < 0 || o.id < 0) return;
        const float lse = k_.log_sum_exp(x, n), mine = x[o.id];
        o.logprob = mine - lse;
        o.rank = 1;
        for (int i = 0; i < n; i++) o.rank += x[i] > mine || (x[i] == mine && i < o.id);
        const size_t want = std::min(d.logprobs[r], n);
        auto& top = o.top;  // kept sorted, best first; want is at most twenty
        for (int i = 0; i < n && want; i++) {
            if (top.size() == want && x[i] <= top.back().second) continue;
            const auto at = std::upper_bound(top.begin(), top.end(), x[i], [](float v, const auto& e) { return v > e.second; });
            top.insert(at, {i, x[i]});
            if (top.size() > want) top.pop_back();
        }
        for (auto& e : top) e.second -= lse;
    };
    if (d.rows < 2) {
        for (int r = 0; r < d.rows; r++) row(r, 0);
    } else {
        std::atomic<int> next{0};
        pool_.run([&](int thread) {
            for (int r; (r = next.fetch_add(1)) < d.rows;) row(r, thread);
        });
    }
    for (int r = 0; r < d.rows; r++)
        if (out[r].id < 0) throw std::invalid_argument("sample: row " + std::to_string(r) + " has no token with a finite logit");
    return out;
}

}  // namespace galley
