// Blocks of rows, each a task that makes its fp32 sums and rounds them; the weight's gradient by blocks of outputs.
#include "linear.h"

#include <numeric>
#include <stdexcept>

#include "driver.h"

namespace turnout::kernels {
namespace {

constexpr int64_t kBlockRows = 128;  // packing a panel of weights for fewer would cost more than 5 %

void check_served(const Implementation& implementation, const LinearProblem& p) {
  if (p.dtype == DType::f64 || implementation.stages == nullptr)
    throw std::invalid_argument(std::string("'") + implementation.name +
                                "' has no linear map of this type; float32 and bfloat16 are served by the others");
}

/// A bank of one expert whose row r is token r, for the stages that the maps share with the experts.
class OneExpert {
 public:
  /// @param hidden, ffn what the stage at hand calls its two sizes
  OneExpert(const LinearProblem& p, int64_t hidden, int64_t ffn)
      : choices_(static_cast<size_t>(std::min(p.rows, kBlockRows))), weight_{p.weight}, bias_{p.bias} {
    std::iota(choices_.begin(), choices_.end(), int64_t{0});
    q.tokens = q.rows = p.rows;
    q.num_experts = q.top_k = 1;
    q.hidden = hidden, q.ffn = ffn;
    q.dtype = p.dtype, q.activation = Activation::relu;
    q.up = q.down = weight_;
    q.down_bias = p.bias ? bias_ : nullptr;
    q.row_of_choice = choices_.data();  // of a block: blocks are combined one by one
  }
  OneExpert(const OneExpert&) = delete;

  ExpertsProblem q;

 private:
  std::vector<int64_t> choices_;
  const void *weight_[1], *bias_[1];
};

/// Rows as products read them, with the copies that this may take.
class Rows {
 public:
  Rows(const Stages& s, const LinearProblem& p, int64_t columns) : s_(s), q_(shape(p, columns)) {}
  void layout(Arena& a) {
    pointers_ = a.take<const char*>(q_.tokens);
    copies_ = a.take<char>(TokenRows::copied_bytes(s_, q_));
  }
  void fill(const void* data, int64_t stride, const ParallelFor& parallel) {
    const TokenRows rows(s_, q_, data, stride, copies_, parallel);
    for (int64_t r = 0; r < q_.tokens; ++r) pointers_[r] = rows.base + r * rows.stride;
  }
  RowSet block(int64_t first, int64_t last) const { return {pointers_ + first, last - first}; }
  RowSet all() const { return block(0, q_.tokens); }

 private:
  static ExpertsProblem shape(const LinearProblem& p, int64_t columns) {
    ExpertsProblem q;
    q.tokens = p.rows, q.hidden = columns, q.dtype = p.dtype;
    return q;
  }
  const Stages& s_;
  const ExpertsProblem q_;
  const char** pointers_ = nullptr;
  char* copies_ = nullptr;
};

/// Gives every block of rows to `product(begin, end, slots, stride, worker)` and writes what it left in the slots,
/// `one.q.hidden` columns, to out. @param worker memory of all workers, block_bytes() each
template <class Product>
void by_blocks(const Stages& s, const OneExpert& one, void* out, char* workers, int64_t bytes,
               const ParallelFor& parallel, Product&& product) {
  const ExpertsProblem& q = one.q;
  const int64_t stride = padded_row(q.hidden, s.panel, 4) / 4, row = q.hidden * static_cast<int64_t>(size_of(q.dtype));
  Schedule schedule;
  schedule.add_split(schedule.new_group(), 0, 0, q.rows, kBlockRows);
  schedule.run(parallel, [&](const Task& t, int w) {
    char* worker = workers + w * bytes;
    float* slots = reinterpret_cast<float*>(worker + worker_bytes(s, 0));
    product(t.begin, t.end, slots, stride, worker);
    s.combine({&q, slots, stride, false, static_cast<char*>(out) + t.begin * row, 0, t.end - t.begin});
  });
}

int64_t block_bytes(const Stages& s, int64_t columns) {
  return round_up(worker_bytes(s, 0) + kBlockRows * padded_row(columns, s.panel, 4), 4096) + 64;
}

}  // namespace

void linear(const Implementation& implementation, const LinearProblem& p, void* y, const ParallelFor& parallel) {
  check_served(implementation, p);
  const Stages& s = *implementation.stages;
  const OneExpert one(p, p.outputs, p.inputs);
  const int64_t bytes = block_bytes(s, p.outputs), threads = std::max(parallel.threads, 1);
  Rows x(s, p, p.inputs);
  char* workers = nullptr;
  const auto scratch = Scratch::of([&](Arena& a) {
    x.layout(a);
    workers = a.take<char>(bytes * threads);
  });
  x.fill(p.x, p.x_stride, parallel);
  by_blocks(s, one, y, workers, bytes, parallel,
            [&](int64_t begin, int64_t end, float* slots, int64_t stride, char* worker) {
              s.down({&one.q, 0, x.block(begin, end), nullptr, 0, div_up(p.outputs, s.panel), nullptr, slots, stride,
                      worker});
            });
}

void linear_backward(const Implementation& implementation, const LinearProblem& p, const void* grad_y,
                     int64_t grad_y_stride, const LinearGradients& grad, const ParallelFor& parallel) {
  check_served(implementation, p);
  const Stages& s = *implementation.stages;
  const bool bf16 = p.dtype == DType::bf16;
  const int64_t element = static_cast<int64_t>(size_of(p.dtype)), threads = std::max(parallel.threads, 1);
  if (p.rows == 0) {
    if (grad.weight) std::memset(grad.weight, 0, static_cast<size_t>(p.outputs * p.inputs * element));
    if (grad.bias) std::memset(grad.bias, 0, static_cast<size_t>(p.outputs * element));
    return;
  }
  const OneExpert one(p, p.inputs, p.outputs);
  // outputs of the weight's gradient that a task takes: one tile, since gates have few
  const int64_t span = s.weight_rows / 8, panels = div_up(p.inputs, s.panel);
  const int64_t words = words_of(p.rows, bf16 && !s.wide_rows), strip = std::min(words, kWeightChunkWords);
  const int64_t weight = round_up(span * strip * 4, 64) + span * panels * s.panel * 4;
  const int64_t bytes = std::max(block_bytes(s, p.inputs), round_up(weight, 4096) + 64);
  Rows x(s, p, p.inputs), g(s, p, p.outputs);
  char *workers = nullptr, *x_panels = nullptr;
  const auto scratch = Scratch::of([&](Arena& a) {
    x.layout(a), g.layout(a);
    x_panels = a.take<char>(grad.weight ? words * panels * s.panel * 4 : 0);
    workers = a.take<char>(bytes * threads);
  });
  if (grad.weight) x.fill(p.x, p.x_stride, parallel);
  g.fill(grad_y, grad_y_stride, parallel);

  if (grad.x)
    by_blocks(s, one, grad.x, workers, bytes, parallel,
              [&](int64_t begin, int64_t end, float* slots, int64_t stride, char* worker) {
                s.input_grad({&one.q, 0, g.block(begin, end), 0, panels, slots, stride, worker});
              });
  if (grad.bias) s.bias_grad({g.all(), nullptr, static_cast<char*>(grad.bias), bf16, 0, p.outputs});
  if (grad.weight == nullptr) return;
  enum { kPack, kWeight };
  Schedule schedule;
  const int packed = schedule.new_group();
  schedule.add_split(packed, kPack, 0, panels, std::max<int64_t>(1, div_up(panels, 4 * threads)));
  schedule.add_split(schedule.new_group(), kWeight, 0, p.outputs, span, packed);
  schedule.run(parallel, [&](const Task& t, int w) {
    if (t.stage == kPack) return s.pack_rows({x.all(), p.inputs, bf16, x_panels, t.begin, t.end});
    s.weight_grad({g.all(), x_panels, p.inputs, t.begin, t.end, static_cast<char*>(grad.weight), bf16,
                   /*streaming=*/false, workers + w * bytes});
  });
}

}  // namespace turnout::kernels
