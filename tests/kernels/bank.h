// A random bank of experts with its routing, owned: the common ground of the kernel tests.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "experts.h"
#include "routing.h"
#include "table.h"

namespace turnout::kernels::test {

/// One std::thread a worker, so that tests can ask for more threads than cores.
inline ParallelFor threads(int n) {
  ParallelFor p;
  p.threads = n;
  p.run = [](void*, int64_t count, void* body, ParallelFor::Body call) {
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < count; ++i) pool.emplace_back([=] { call(body, i, i + 1); });
    for (std::thread& t : pool) t.join();
  };
  if (n == 1) p.run = nullptr;
  return p;
}

inline uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

/// Memory for `count` elements, offset by `skew` elements from a 64-byte boundary, with a guard after the end.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType t, int64_t count, int64_t skew = 0)
      : type_(t), count_(count), skew_(skew), bytes_(static_cast<size_t>(count + skew + 64) * size_of(t) + 64, 0x5a) {}
  Buffer(Buffer&&) = default;  // data() depends on where the memory lies: no copies
  Buffer& operator=(Buffer&&) = default;
  char* data() const {
    char* p = const_cast<char*>(bytes_.data());
    p += (64 - (reinterpret_cast<uintptr_t>(p) & 63)) & 63;
    return p + static_cast<size_t>(skew_) * size_of(type_);
  }
  int64_t size() const { return count_; }
  double get(int64_t i) const {
    if (type_ == DType::bf16) return from_bf16(reinterpret_cast<uint16_t*>(data())[i]);
    return type_ == DType::f32 ? reinterpret_cast<float*>(data())[i] : reinterpret_cast<double*>(data())[i];
  }
  void set(int64_t i, double v) {
    if (type_ == DType::bf16)
      reinterpret_cast<uint16_t*>(data())[i] = to_bf16(static_cast<float>(v));
    else if (type_ == DType::f32)
      reinterpret_cast<float*>(data())[i] = static_cast<float>(v);
    else
      reinterpret_cast<double*>(data())[i] = v;
  }
  /// Nothing was written behind the last element.
  bool intact() const {
    const char* end = data() + static_cast<size_t>(count_) * size_of(type_);
    for (int i = 0; i < 32; ++i)
      if (end[i] != 0x5a) return false;
    return true;
  }
  bool same_bits(const Buffer& o) const {
    return count_ == o.count_ && std::memcmp(data(), o.data(), static_cast<size_t>(count_) * size_of(type_)) == 0;
  }

 private:
  DType type_ = DType::f32;
  int64_t count_ = 0, skew_ = 0;
  std::vector<char> bytes_;
};

struct Config {
  DType dtype = DType::f32;
  Activation activation = Activation::gelu;
  bool bias = false;
  bool weight_before_down = false;
  double scale = 1;  ///< of x: beyond 1 to reach the clamps
  int64_t tokens = 8, hidden = 32, ffn = 32, experts = 4, top_k = 2;
  bool integers = false;    ///< weights and x in {-1, 0, 1}: every sum is exact
  double dropped = 0;       ///< share of choices that are not sent
  bool one_expert = false;  ///< every token's first choice is expert 0, the others are not sent
  int64_t skew = 0;         ///< elements by which pointers are off a cache line
  uint32_t seed = 1;
};

struct Outputs {
  Buffer y, saved, grad_x, grad_weights;
  std::vector<Buffer> grad_up, grad_down, grad_up_bias, grad_down_bias;
};

class Bank {
 public:
  explicit Bank(const Config& c) : c_(c), random_(c.seed) {
    const int64_t U = is_gated(c.activation) ? 2 * c.ffn : c.ffn;
    x_ = Buffer(c.dtype, c.tokens * (c.hidden + 3), c.skew);
    grad_y_ = Buffer(c.dtype, c.tokens * c.hidden, c.skew);
    fill(x_, c.scale);
    fill(grad_y_, 1);
    for (int64_t e = 0; e < c.experts; ++e) {
      add(up_, up_p_, U * c.hidden, 1 / std::sqrt(static_cast<double>(c.hidden)));
      add(down_, down_p_, c.hidden * c.ffn, 1 / std::sqrt(static_cast<double>(c.ffn)));
      add(up_bias_, up_bias_p_, U, 1);
      add(down_bias_, down_bias_p_, c.hidden, 1);
    }
    weights_ = Buffer(c.dtype == DType::f64 ? DType::f64 : DType::f32, c.tokens * c.top_k);
    for (int64_t i = 0; i < weights_.size(); ++i)
      weights_.set(i, c.integers ? 1 + static_cast<double>(random_() % 2) : uniform() * 0.5 + 0.75);
    route();
  }

  ExpertsProblem problem() const {
    ExpertsProblem q;
    q.tokens = c_.tokens, q.hidden = c_.hidden, q.ffn = c_.ffn, q.num_experts = c_.experts, q.top_k = c_.top_k;
    q.rows = offsets_.back();
    q.dtype = c_.dtype, q.activation = c_.activation, q.weight_before_down = c_.weight_before_down;
    q.x = x_.data(), q.x_stride = c_.hidden + 3;
    q.up = up_p_.data(), q.down = down_p_.data();
    if (c_.bias) q.up_bias = up_bias_p_.data(), q.down_bias = down_bias_p_.data();
    q.expert_offsets = offsets_.data(), q.token_of_row = token_of_row_.data();
    q.row_of_choice = row_of_choice_.data(), q.topk_weights = weights_.data();
    return q;
  }

  /// Forward, backward and every output of an implementation.
  Outputs run(const Implementation& impl, int n_threads = 1, bool packed = false, bool recompute = false) const {
    Outputs o = run_forward(impl, n_threads, packed);
    run_backward(impl, n_threads, recompute ? nullptr : &o.saved, o);
    return o;
  }

  /// y and saved.
  Outputs run_forward(const Implementation& impl, int n_threads, bool packed) const {
    const ExpertsProblem q = problem();
    const ParallelFor parallel = threads(n_threads);
    Outputs o;
    o.y = Buffer(c_.dtype, c_.tokens * c_.hidden, c_.skew);
    o.saved = Buffer(c_.dtype, q.rows * q.up_rows(), c_.skew);
    if (!packed) {
      forward(impl, q, nullptr, o.y.data(), o.saved.data(), parallel);
      return o;
    }
    const PackedLayout layout(impl, q);
    const Buffer memory(DType::bf16, static_cast<int64_t>(layout.bytes() / 2));
    pack(impl, q, memory.data(), parallel);
    const PackedExperts weights(layout, memory.data(), layout.bytes());
    ExpertsProblem no_weights = q;
    no_weights.up = no_weights.down = nullptr;
    forward(impl, no_weights, &weights, o.y.data(), o.saved.data(), parallel);
    if (!memory.intact()) o.y.set(0, NAN);  // packing wrote behind its block
    return o;
  }

  /// The gradients, from pre-activations or, where null, recomputing them.
  void run_backward(const Implementation& impl, int n_threads, const Buffer* saved, Outputs& o) const {
    const ExpertsProblem q = problem();
    o.grad_x = Buffer(c_.dtype, c_.tokens * c_.hidden, c_.skew);
    o.grad_weights = Buffer(c_.dtype == DType::f64 ? DType::f64 : DType::f32, c_.tokens * c_.top_k);
    std::vector<void*> gu, gd, gub, gdb;
    const auto make = [&](std::vector<Buffer>& list, std::vector<void*>& p, int64_t n) {
      list.clear();
      for (int64_t e = 0; e < c_.experts; ++e) {
        list.emplace_back(c_.dtype, n, c_.skew);
        p.push_back(list.back().data());
      }
    };
    make(o.grad_up, gu, q.up_rows() * c_.hidden);
    make(o.grad_down, gd, c_.hidden * c_.ffn);
    make(o.grad_up_bias, gub, q.up_rows());
    make(o.grad_down_bias, gdb, c_.hidden);
    ExpertsGradients g;
    g.x = o.grad_x.data(), g.topk_weights = o.grad_weights.data();
    g.up = gu.data(), g.down = gd.data(), g.up_bias = gub.data(), g.down_bias = gdb.data();
    backward(impl, q, saved ? saved->data() : nullptr, grad_y_.data(), c_.hidden, g, threads(n_threads));
  }

  /// The same bank with the absolute value of every number, in double: what flows through it are the sums of |a||b|.
  /// Without clamps, which would hide sizes: g·σ(1.702·g) ≤ silu's 1.1·g, and |v + 1| ≤ |v| + 1, a bias of up.
  Bank absolute() const {
    Config wide = c_;
    wide.dtype = DType::f64;
    const bool clamped = c_.activation == Activation::swiglu_clamped;
    if (clamped) wide.activation = Activation::swiglu, wide.bias = true;
    Bank bank(wide);  // the seed gives the same routing
    const auto copy = [](Buffer& to, const Buffer& from) {
      for (int64_t i = 0; i < to.size(); ++i) to.set(i, std::abs(from.get(i)));
    };
    copy(bank.x_, x_), copy(bank.grad_y_, grad_y_), copy(bank.weights_, weights_);
    for (size_t e = 0; e < up_.size(); ++e) {
      copy(bank.up_[e], up_[e]), copy(bank.down_[e], down_[e]);
      copy(bank.up_bias_[e], up_bias_[e]), copy(bank.down_bias_[e], down_bias_[e]);
      if (!clamped) continue;
      for (int64_t i = 0; i < 2 * c_.ffn; ++i)
        bank.up_bias_[e].set(i, (c_.bias ? bank.up_bias_[e].get(i) : 0) + (i < c_.ffn ? 0 : 1));
      for (int64_t d = 0; d < c_.hidden && !c_.bias; ++d) bank.down_bias_[e].set(d, 0);
    }
    bank.up_offset_ = clamped ? 1 : 0;
    return bank;
  }

  /// |u|, for a backward of absolute().
  Buffer magnitudes_of(const Buffer& saved) const {
    const int64_t U = problem().up_rows();
    Buffer u(DType::f64, saved.size());
    for (int64_t i = 0; i < u.size(); ++i)
      u.set(i, std::abs(saved.get(i)) + (i % U < c_.ffn ? 0 : up_offset_));
    return u;
  }

  Buffer& x() { return x_; }
  Buffer& grad_y() { return grad_y_; }
  Buffer& weights() { return weights_; }
  std::vector<Buffer>& up() { return up_; }
  std::vector<Buffer>& down() { return down_; }
  std::vector<Buffer>& up_bias() { return up_bias_; }
  std::vector<Buffer>& down_bias() { return down_bias_; }

 private:
  double uniform() { return std::uniform_real_distribution<double>(-1, 1)(random_); }
  void fill(Buffer& b, double scale) {
    for (int64_t i = 0; i < b.size(); ++i)
      b.set(i, c_.integers ? static_cast<double>(random_() % 3) - 1 : uniform() * scale);
  }
  void add(std::vector<Buffer>& list, std::vector<const void*>& pointers, int64_t n, double scale) {
    list.emplace_back(c_.dtype, n, c_.skew);
    fill(list.back(), scale);
    pointers.push_back(list.back().data());
  }
  void route() {
    std::vector<int64_t> ids(static_cast<size_t>(c_.tokens * c_.top_k), -1);
    for (int64_t t = 0; t < c_.tokens; ++t) {
      const int64_t start = static_cast<int64_t>(random_() % static_cast<uint32_t>(c_.experts));
      for (int64_t k = 0; k < c_.top_k; ++k) {
        int64_t& id = ids[static_cast<size_t>(t * c_.top_k + k)];
        if (c_.one_expert)
          id = k == 0 ? 0 : -1;
        else if (uniform() * 0.5 + 0.5 >= c_.dropped)
          id = (start + k) % c_.experts;
      }
    }
    const size_t n = ids.size();
    offsets_.resize(static_cast<size_t>(c_.experts) + 1);
    token_of_row_.resize(n);
    row_of_choice_.resize(n);
    plan(ids.data(), c_.tokens, c_.top_k, c_.experts, offsets_.data(), token_of_row_.data(), row_of_choice_.data(),
         ParallelFor{});
  }

  Config c_;
  std::mt19937 random_;
  double up_offset_ = 0;  // what absolute() adds to the up rows
  Buffer x_, grad_y_, weights_;
  std::vector<Buffer> up_, down_, up_bias_, down_bias_;
  std::vector<const void*> up_p_, down_p_, up_bias_p_, down_bias_p_;
  std::vector<int64_t> offsets_, token_of_row_, row_of_choice_;
};

/// Implementations that this machine runs, the reference left out.
inline std::vector<const Implementation*> runnable() {
  std::vector<const Implementation*> list;
  for (const Implementation& i : implementations()) {
    if (i.stages == nullptr) continue;
    try {
      list.push_back(&find(i.name));
    } catch (const std::exception&) {
      continue;
    }
  }
  return list;
}

}  // namespace turnout::kernels::test
