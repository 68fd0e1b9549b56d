// Backward: a batch of experts at a time goes through four stages, each beside other stages of the next batch.
//
//     pack     panels of x over the rows (and u, where it was not kept)
//     hidden   p = grad_y · down; du, panels of topk_weight·h, ⟨p, h⟩
//     input    grad x of each row = du · up
//     weights  grad up = duᵀ · x, grad down = grad_yᵀ · (topk_weight·h), biases
//
// A weight gradient is reduced over all rows of its expert by one task a block of outputs: no sum depends on threads.
#include <cstring>

#include "driver.h"
#include "ref/reference.h"

namespace turnout::kernels {
namespace {

enum Stage { kPack, kUp, kHidden, kInput, kWeightUp, kWeightDown, kBiasUp, kBiasDown, kZero, kCombine };
constexpr size_t kRing = 3;                        // batches alive at a time …
constexpr int64_t kRingBytes = int64_t{48} << 20;  // … or two, where three would take more than this
constexpr int64_t kBatchRows = 256;                // rows of a batch of small experts
constexpr int64_t kCombineTokens = 32;
constexpr int64_t kWeightStripWords = 96 * kWeightChunkWords;  // of a block of a weight gradient: 384 KB
constexpr int64_t kCacheBytes = int64_t{8} << 20;              // gradients beyond this are written past the caches

struct Item {
  int64_t expert, row, rows;
  int64_t slot_row = 0, slot_word = 0;  ///< first row, first word over rows, within the ring
  int up = -1, pack = -1, hidden = -1;  ///< groups
};

std::vector<Item> items_of(const ExpertsProblem& q) {
  std::vector<Item> items;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const int64_t begin = q.expert_offsets[e], rows = q.expert_offsets[e + 1] - begin;
    if (rows > 0) items.push_back({e, begin, rows});
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.rows > b.rows; });
  return items;
}

class Backward {
 public:
  Backward(const Stages& s, const ExpertsProblem& q, const void* saved_up, const void* grad_y, int64_t grad_y_stride,
           const ExpertsGradients& grad, const ParallelFor& parallel)
      : s_(s),
        q_(q),
        grad_(grad),
        saved_(static_cast<const char*>(saved_up)),
        bf16_(q.dtype == DType::bf16),
        paired_(bf16_ && !s.wide_rows),
        threads_(std::max(parallel.threads, 1)),
        items_(items_of(q)),
        batches_(batches_of(items_, std::max(items_.empty() ? 0 : items_.front().rows, kBatchRows))) {
    plan_ring();
    plan_schedule();
    const auto scratch = Scratch::of([this](Arena& a) { layout(a); });
    fill(grad_y, grad_y_stride, parallel);
    schedule_.run(parallel, [this](const Task& t, int w) { run(t, m_.workers + w * worker_); });
  }

 private:
  int64_t row_words(int64_t rows) const { return words_of(rows, paired_); }  // of a panel over rows
  int64_t element() const { return static_cast<int64_t>(size_of(q_.dtype)); }
  int64_t ffn_panels() const { return div_up(q_.ffn, s_.panel); }
  int64_t hidden_panels() const { return div_up(q_.hidden, s_.panel); }
  bool wants_up() const { return grad_.up != nullptr; }
  bool wants_down() const { return grad_.down != nullptr; }

  void plan_ring() {
    for (const Batch& b : batches_) {
      ring_rows_ = std::max(ring_rows_, b.rows);
      int64_t words = 0;
      for (size_t i = b.first; i < b.last; ++i) words += row_words(items_[i].rows);
      ring_words_ = std::max(ring_words_, words);
    }
    const int64_t of_row = row_element(s_, bf16_);
    du_stride_ = padded_row(q_.up_rows(), s_.panel, static_cast<size_t>(of_row));
    slot_stride_ = padded_row(q_.hidden, s_.panel, 4) / 4;
    const int64_t row = du_stride_ + (saved_ ? 0 : q_.up_rows() * element()) + (q_.hidden + q_.ffn) * of_row;
    ring_ = std::min(batches_.size(), row * ring_rows_ * static_cast<int64_t>(kRing) > kRingBytes ? 2 : kRing);
    for (size_t b = 0; b < batches_.size(); ++b) {
      int64_t at = static_cast<int64_t>(b % ring_) * ring_rows_, word = static_cast<int64_t>(b % ring_) * ring_words_;
      for (size_t i = batches_[b].first; i < batches_[b].last; ++i) {
        items_[i].slot_row = at;
        items_[i].slot_word = word;
        at += items_[i].rows;
        word += row_words(items_[i].rows);
      }
    }
  }

  /// Outputs of a weight gradient that a task takes: as many as its packed columns fit beside.
  int64_t weight_span(int64_t rows) const {
    const int64_t words = std::min(row_words(rows), kWeightChunkWords);
    return std::max<int64_t>(1, std::min<int64_t>(kWeightStripWords / words / s_.weight_rows, 8)) * s_.weight_rows;
  }

  void plan_schedule() {
    const int64_t n = static_cast<int64_t>(items_.size());
    const int64_t hidden_span = span_of(ffn_panels(), words_of(q_.hidden, bf16_), n, threads_, kNaturalChunkWords);
    const int64_t input_span = span_of(hidden_panels(), words_of(q_.up_rows(), bf16_), n, threads_, kNaturalChunkWords);
    const int64_t up_n = up_panels(q_, s_.panel);
    const int64_t up_span = span_of(up_n, words_of(q_.hidden, bf16_), n, threads_);
    const int64_t pack_span = std::max<int64_t>(8, div_up(hidden_panels(), 2 * threads_));
    std::vector<int> done(batches_.size());
    for (size_t b = 0; b <= batches_.size(); ++b) {
      const int reuse = b >= ring_ && b < batches_.size() ? done[b - ring_] : -1;
      if (b < batches_.size()) {
        done[b] = schedule_.new_group();
        each(b, [&](Item& it, int64_t i) {
          it.pack = schedule_.new_group();
          it.hidden = schedule_.new_group();
          if (wants_up()) schedule_.add_split(it.pack, kPack, i, hidden_panels(), pack_span, reuse);
          if (saved_) return;
          it.up = schedule_.new_group();
          schedule_.add_split(it.up, kUp, i, up_n, up_span, reuse);
        });
      }
      if (b > 0 && grad_.x)
        each(b - 1, [&](Item& it, int64_t i) {
          schedule_.add_split(done[b - 1], kInput, i, hidden_panels(), input_span, it.hidden);
        });
      if (b < batches_.size())
        each(b, [&](Item& it, int64_t i) {
          schedule_.add_split(it.hidden, kHidden, i, ffn_panels(), hidden_span, reuse, it.up);
        });
      if (b > 0) each(b - 1, [&](Item& it, int64_t i) { plan_weights(it, i, done[b - 1]); });
    }
    plan_rest(done);
    worker_ = worker_bytes(s_, weight_bytes());
  }

  void plan_weights(const Item& it, int64_t i, int done) {
    const int64_t span = weight_span(it.rows), columns = 16 * s_.panel;
    if (wants_up()) schedule_.add_split(done, kWeightUp, i, q_.up_rows(), span, it.hidden, it.pack);
    if (wants_down()) schedule_.add_split(done, kWeightDown, i, q_.hidden, span, it.hidden);
    if (grad_.up_bias) schedule_.add_split(done, kBiasUp, i, q_.up_rows(), columns, it.hidden);
    if (grad_.down_bias) schedule_.add_split(done, kBiasDown, i, q_.hidden, columns, it.hidden);
  }

  /// Zeros for experts without rows, and, when every batch is done, the sums over a token's choices.
  void plan_rest(const std::vector<int>& done) {
    const int zero = schedule_.new_group();
    for (int64_t e = 0; e < q_.num_experts; ++e)
      if (q_.expert_offsets[e] == q_.expert_offsets[e + 1]) schedule_.add(zero, kZero, e, 0, 0);
    int before = -1;
    for (int d : done) {
      const int closed = schedule_.new_group();
      schedule_.add(closed, kCombine, 0, 0, 0, d, before);
      before = closed;
    }
    // ⟨p, h⟩ is complete when the batch is only if its input or weight gradients waited for it: wait for it itself
    for (const Item& it : items_) {
      const int closed = schedule_.new_group();
      schedule_.add(closed, kCombine, 0, 0, 0, it.hidden, before);
      before = closed;
    }
    schedule_.add_split(schedule_.new_group(), kCombine, 0, q_.tokens, kCombineTokens, before);
  }

  int64_t weight_bytes() const {
    int64_t bytes = 0;
    for (const Item& it : items_) {
      const int64_t words = row_words(it.rows), span = weight_span(it.rows);
      const int64_t columns = round_up(std::max(q_.hidden, q_.ffn), s_.panel);
      const int64_t sums = words > kWeightChunkWords ? span * columns * 4 : 0;
      bytes = std::max(bytes, round_up(span * std::min(words, kWeightChunkWords) * 4, 64) + sums);
    }
    return bytes;
  }

  void layout(Arena& a) {
    const int64_t ring = static_cast<int64_t>(ring_), rows = ring * ring_rows_, words = ring * ring_words_;
    m_.x_rows = a.take<const char*>(q_.rows);
    m_.g_rows = a.take<const char*>(q_.rows);
    m_.du_rows = a.take<const char*>(rows);
    m_.weight = a.take<float>(q_.rows);
    m_.expert = a.take<int64_t>(q_.rows);
    m_.dots = a.take<float>(q_.rows * ffn_panels());
    m_.x_copies = a.take<char>(TokenRows::copied_bytes(s_, q_));
    m_.g_copies = a.take<char>(TokenRows::copied_bytes(s_, q_));
    m_.u = a.take<char>(saved_ ? 0 : rows * q_.up_rows() * element());
    m_.du = a.take<char>(rows * du_stride_);
    m_.wh = a.take<char>(wants_down() ? words * ffn_panels() * s_.panel * 4 : 0);
    m_.xp = a.take<char>(wants_up() ? words * hidden_panels() * s_.panel * 4 : 0);
    m_.slots = a.take<float>(grad_.x ? q_.rows * slot_stride_ : 0);
    m_.workers = a.take<char>(worker_ * threads_);
  }

  void fill(const void* grad_y, int64_t grad_y_stride, const ParallelFor& parallel) {
    const TokenRows x(s_, q_, q_.x, q_.x_stride, m_.x_copies, parallel);
    const TokenRows g(s_, q_, grad_y, grad_y_stride, m_.g_copies, parallel);
    for (int64_t r = 0; r < q_.rows; ++r) {
      m_.x_rows[r] = x.base + q_.token_of_row[r] * x.stride;
      m_.g_rows[r] = g.base + q_.token_of_row[r] * g.stride;
    }
    weights_of_rows(q_, m_.weight);
    for (const Item& it : items_)
      for (int64_t r = 0; r < it.rows; ++r) m_.expert[it.row + r] = it.expert;
    for (int64_t r = 0; r < static_cast<int64_t>(ring_) * ring_rows_; ++r) m_.du_rows[r] = m_.du + r * du_stride_;
    const int64_t weight_bytes = q_.num_experts * (q_.up_rows() + q_.ffn) * q_.hidden * element();
    streaming_ = weight_bytes > kCacheBytes;
  }

  template <class F>
  void each(size_t batch, F&& f) {
    for (size_t i = batches_[batch].first; i < batches_[batch].last; ++i) f(items_[i], static_cast<int64_t>(i));
  }

  void run(const Task& t, char* worker) {
    if (t.stage == kCombine) return combine(t.begin, t.end);
    if (t.stage == kZero) return zero(t.item);
    const Item& it = items_[static_cast<size_t>(t.item)];
    const RowSet x{m_.x_rows + it.row, it.rows}, g{m_.g_rows + it.row, it.rows};
    const RowSet du{m_.du_rows + it.slot_row, it.rows};
    char* u = saved_ ? const_cast<char*>(saved_) + it.row * q_.up_rows() * element()
                     : m_.u + it.slot_row * q_.up_rows() * element();
    char* wh = wants_down() ? m_.wh + it.slot_word * ffn_panels() * s_.panel * 4 : nullptr;
    char* xp = wants_up() ? m_.xp + it.slot_word * hidden_panels() * s_.panel * 4 : nullptr;
    const auto out = [&](void* const* list) { return static_cast<char*>(list[it.expert]); };
    switch (static_cast<Stage>(t.stage)) {
      case kPack:
        return s_.pack_rows({x, q_.hidden, bf16_, xp, t.begin, t.end});
      case kUp:
        return s_.up({&q_, it.expert, x, nullptr, t.begin, t.end, nullptr, 0, u, nullptr, worker});
      case kHidden:
        return s_.hidden_grad({&q_, it.expert, g, m_.weight + it.row, u, t.begin, t.end,
                               m_.du + it.slot_row * du_stride_, du_stride_, wh, m_.dots + it.row * ffn_panels(),
                               ffn_panels(), worker});
      case kInput:
        return s_.input_grad(
            {&q_, it.expert, du, t.begin, t.end, m_.slots + it.row * slot_stride_, slot_stride_, worker});
      case kWeightUp:
        return s_.weight_grad({du, xp, q_.hidden, t.begin, t.end, out(grad_.up), bf16_, streaming_, worker});
      case kWeightDown:
        return s_.weight_grad({g, wh, q_.ffn, t.begin, t.end, out(grad_.down), bf16_, streaming_, worker});
      case kBiasUp:
        return s_.bias_grad({du, nullptr, out(grad_.up_bias), bf16_, t.begin, t.end});
      case kBiasDown:
        return s_.bias_grad({g, m_.weight + it.row, out(grad_.down_bias), bf16_, t.begin, t.end});
      case kZero:
      case kCombine:
        return;
    }
  }

  void zero(int64_t e) {
    const auto clear = [&](void* const* list, int64_t n) {
      if (list) std::memset(list[e], 0, static_cast<size_t>(n * element()));
    };
    clear(grad_.up, q_.up_rows() * q_.hidden);
    clear(grad_.down, q_.hidden * q_.ffn);
    clear(grad_.up_bias, q_.up_rows());
    clear(grad_.down_bias, q_.hidden);
  }

  void combine(int64_t begin, int64_t end) {
    if (grad_.x) s_.combine({&q_, m_.slots, slot_stride_, false, static_cast<char*>(grad_.x), begin, end});
    if (grad_.topk_weights == nullptr) return;
    float* out = static_cast<float*>(grad_.topk_weights);
    for (int64_t i = begin * q_.top_k; i < end * q_.top_k; ++i) {
      const int64_t r = q_.row_of_choice[i];
      float sum = 0;
      if (r >= 0) {
        for (int64_t p = 0; p < ffn_panels(); ++p) sum += m_.dots[r * ffn_panels() + p];
        if (q_.down_bias)
          sum += s_.dot(m_.g_rows[r], static_cast<const char*>(q_.down_bias[m_.expert[r]]), q_.hidden, bf16_);
      }
      out[i] = sum;
    }
  }

  struct Memory {
    const char **x_rows, **g_rows, **du_rows;
    float *weight, *dots, *slots;
    int64_t* expert;
    char *x_copies, *g_copies, *u, *du, *wh, *xp, *workers;
  };

  const Stages& s_;
  const ExpertsProblem& q_;
  const ExpertsGradients& grad_;
  const char* saved_;
  const bool bf16_, paired_;  // paired: words over rows hold two
  const int threads_;
  std::vector<Item> items_;
  const std::vector<Batch> batches_;
  size_t ring_ = 0;
  int64_t ring_rows_ = 0, ring_words_ = 0, du_stride_ = 0, slot_stride_ = 0, worker_ = 0;
  bool streaming_ = false;
  Schedule schedule_;
  Memory m_{};
};

}  // namespace

void backward(const Implementation& implementation, const ExpertsProblem& problem, const void* saved_up,
              const void* grad_y, int64_t grad_y_stride, const ExpertsGradients& grad, const ParallelFor& parallel) {
  check_type(implementation, problem);
  if (implementation.stages == nullptr) return ref::backward(problem, saved_up, grad_y, grad_y_stride, grad);
  Backward(*implementation.stages, problem, saved_up, grad_y, grad_y_stride, grad, parallel);
}

}  // namespace turnout::kernels
