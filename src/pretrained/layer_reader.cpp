// A layer's published tensors to the parameters of MoE: fused or per expert, plain, MXFP4 or float8 in blocks.
//
// Legend: E experts, D hidden, F ffn, U rows of `up`: 2·F where the activation is gated, gate rows first.
#include "pretrained/layer_tensors.h"

#include <turnout/checkpoint.h>
#include <turnout/quantized.h>

#include <ATen/ATen.h>

#include <set>
#include <sstream>

namespace turnout::pretrained {
namespace {

bool is_plain(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble;
}

template <class Value>
std::string text(const Value& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// A matrix or bank as it lies in the file. Decoded only when it is used, one after the other.
struct Weight {
  at::Tensor values;
  at::Tensor scale;  // float8 alone
  std::array<int64_t, 2> block;

  at::ScalarType type() const { return scale.defined() ? at::kBFloat16 : values.scalar_type(); }
  /// In float32 where such numbers are asked for: rounding to bfloat16 would lose some.
  at::Tensor decoded(std::optional<at::ScalarType> asked) const {
    if (!scale.defined()) return values;
    return decode_fp8_blocks(values, scale, block,
                             asked == at::kFloat || asked == at::kDouble ? at::kFloat : at::kBFloat16);
  }
};

// Takes tensors by name and shape, and remembers everything that was wrong until the end.
class Taker {
 public:
  Taker(const Config& config, const Tensors& published) : config_(config), published_(published) {}

  bool has(const std::string& name) const { return published_.count(name) > 0; }
  bool sound() const { return problems_.empty(); }

  /// A tensor as it lies in the file; undefined, and noted, where it does not fit.
  at::Tensor stored(const std::string& name, at::IntArrayRef shape, bool (*fits)(at::ScalarType), const char* kind) {
    const auto found = published_.find(name);
    if (found == published_.end()) return note(name, " is missing");
    used_.insert(name);
    const at::Tensor& tensor = found->second;
    if (tensor.sizes() == shape && fits(tensor.scalar_type())) return tensor;
    return note(name, " is " + text(tensor.scalar_type()) + " " + text(tensor.sizes()) + ", expected " + kind + " " +
                          text(shape));
  }

  /// A matrix or bank; with float8 scales where such stand beside it.
  Weight weight(const std::string& name, at::IntArrayRef shape) {
    const std::string scale_name = name + "_scale_inv";
    if (!has(scale_name)) return {stored(name, shape, is_plain, "floating point"), {}, config_.fp8_block};
    auto grid = shape.vec();
    for (const int axis : {0, 1}) {
      int64_t& size = grid[grid.size() - 2 + axis];
      size = (size - 1) / config_.fp8_block[axis] + 1;
    }
    const auto is_float8 = [](at::ScalarType type) { return type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2; };
    const auto is_scale = [](at::ScalarType type) {
      return type == at::kFloat || type == at::kBFloat16 || type == at::kFloat8_e8m0fnu;
    };
    return {stored(name, shape, is_float8, "float8"),
            stored(scale_name, grid, is_scale, "float32, bfloat16 or float8_e8m0fnu"), config_.fp8_block};
  }

  at::Tensor note(const std::string& name, const std::string& problem) {
    constexpr int64_t kMost = 5000;  // lists no layer is near; what a hostile config claims to have has no end
    if (++count_ <= kMost)
      problems_.append(problems_.empty() ? "'" : "; '").append(name).append("'").append(problem);
    else if (count_ == kMost + 1)
      problems_.append("; and more");
    return {};
  }

  void finish(const std::string& source) {
    for (const auto& item : published_)
      if (!used_.count(item.first)) note(item.first, " is unused");
    if (!problems_.empty())
      throw FileError(source + ": does not fit the " + config_.family->name + " of its config.json: " + problems_);
  }

 private:
  const Config& config_;
  const Tensors& published_;
  std::set<std::string> used_;
  std::string problems_;
  int64_t count_ = 0;
};

// Rows g0 u0 g1 u1 … to g0 g1 … u0 u1 …; [2·F, …]
at::Tensor gate_rows_first(const at::Tensor& rows) {
  auto pairs = rows.unflatten(0, {rows.size(0) / 2, 2});
  return pairs.transpose(0, 1).flatten(0, 1);
}

class LayerReader {
 public:
  LayerReader(const Config& config, const Tensors& published, std::optional<at::ScalarType> type)
      : family_(*config.family), options_(config.moe.options), type_(type), take_(config, published) {}

  Tensors read(const std::string& source) {
    read_gate();
    const std::string& bank = family_.fused.up;
    if (!bank.empty() && take_.has(bank + "_blocks"))
      read_mxfp4_banks();
    else if (!bank.empty() && (take_.has(bank) || family_.per_expert.down.empty()))
      read_banks();
    else
      read_experts();
    if (options_.shared.ffn > 0) read_shared();
    take_.finish(source);
    for (const char* name :
         {"experts.up", "experts.down", "experts.up_bias", "experts.down_bias", "shared.up", "shared.down"})
      if (const auto found = module_.find(name); found != module_.end()) found->second = found->second.to(*type_);
    return std::move(module_);
  }

 private:
  int64_t E() const { return options_.num_experts; }
  int64_t D() const { return options_.hidden; }
  int64_t F() const { return options_.ffn; }
  bool gated() const { return is_gated(options_.activation); }
  int64_t U() const { return gated() ? 2 * F() : F(); }

  void put(const char* name, const at::Tensor& tensor) { module_[name] = tensor; }
  void put(const char* name, const Weight& weight) {
    if (take_.sound()) module_[name] = weight.decoded(type_);
  }
  void set_type(const Weight& weight) {
    if (!type_ && take_.sound()) type_ = weight.type();
  }
  at::Tensor make(at::IntArrayRef sizes) const { return at::empty(sizes, at::TensorOptions(*type_)); }

  void read_gate() {
    put("gate.weight", take_.weight(family_.gate + ".weight", {E(), D()}));
    if (options_.gate_bias) put("gate.bias", take_.weight(family_.gate + ".bias", {E()}));
    if (options_.selection_bias) put("selection_bias", take_.weight(family_.selection_bias, {E()}));
  }

  struct Matrices {
    Weight gate, up, down;
  };
  Matrices take_matrices(const ExpertNames& names, int64_t ffn) {
    Matrices found;
    if (gated()) found.gate = take_.weight(names.gate, {ffn, D()});
    found.up = take_.weight(names.up, {ffn, D()});
    found.down = take_.weight(names.down, {D(), ffn});
    set_type(found.down);
    return found;
  }
  void copy_up(const Matrices& from, const at::Tensor& to) const {
    const int64_t ffn = from.up.values.size(0);
    if (gated()) to.narrow(0, 0, ffn).copy_(from.gate.decoded(type_));
    to.narrow(0, gated() ? ffn : 0, ffn).copy_(from.up.decoded(type_));
  }

  void read_experts() {
    std::vector<Matrices> experts;
    for (int64_t e = 0; e < E(); ++e) {
      const ExpertNames names{with_number(family_.per_expert.gate, e), with_number(family_.per_expert.up, e),
                              with_number(family_.per_expert.down, e)};
      experts.push_back(take_matrices(names, F()));
    }
    if (!take_.sound()) return;  // banks of this size are made only where the file has as much
    const at::Tensor up = make({E(), U(), D()});
    const at::Tensor down = make({E(), D(), F()});
    for (int64_t e = 0; e < E(); ++e) {
      copy_up(experts[e], up[e]);
      down[e].copy_(experts[e].down.decoded(type_));
    }
    put("experts.up", up);
    put("experts.down", down);
  }

  void read_banks() {
    const BankNames& names = family_.fused;
    const bool turned = names.transposed;
    const Weight up = take_.weight(names.up, turned ? std::vector{E(), D(), U()} : std::vector{E(), U(), D()});
    const Weight down = take_.weight(names.down, turned ? std::vector{E(), F(), D()} : std::vector{E(), D(), F()});
    set_type(down);
    if (options_.bias) read_bank_biases();
    if (!take_.sound()) return;
    put("experts.up", up);
    put("experts.down", down);
    if (!turned) return;
    const at::Tensor rows = make({E(), U(), D()});
    for (int64_t e = 0; e < E(); ++e) rows[e].copy_(gate_rows_first(module_["experts.up"][e].t()));
    put("experts.up", rows);
    put("experts.down", module_["experts.down"].to(*type_).transpose(1, 2).contiguous());
  }

  void read_bank_biases() {
    const Weight up = take_.weight(family_.fused.up + "_bias", {E(), U()});
    const Weight down = take_.weight(family_.fused.down + "_bias", {E(), D()});
    if (!take_.sound()) return;
    put("experts.up_bias", family_.fused.transposed ? gate_rows_first(up.values.t()).t().contiguous() : up.values);
    put("experts.down_bias", down);
  }

  struct Mxfp4 {
    at::Tensor blocks, scales;
  };
  // rows × columns of each expert, a scale for 32 columns
  Mxfp4 take_mxfp4(const std::string& name, int64_t rows, int64_t columns) {
    const auto is_byte = [](at::ScalarType type) { return type == at::kByte; };
    const auto is_scale = [](at::ScalarType type) { return type == at::kByte || type == at::kFloat8_e8m0fnu; };
    if (columns % 32 != 0) take_.note(name, " has " + std::to_string(columns) + " columns, expected a multiple of 32");
    return {take_.stored(name + "_blocks", {E(), rows, columns / 32, 16}, is_byte, "uint8"),
            take_.stored(name + "_scales", {E(), rows, columns / 32}, is_scale, "uint8 or float8_e8m0fnu")};
  }
  at::Tensor decode(const Mxfp4& from, bool in_turn) const {
    const auto decoded = *type_ == at::kFloat || *type_ == at::kDouble ? at::kFloat : at::kBFloat16;
    const at::Tensor bank = make({E(), from.blocks.size(1), 32 * from.blocks.size(2)});
    for (int64_t e = 0; e < E(); ++e) {
      const at::Tensor matrix = decode_mxfp4(from.blocks[e], from.scales[e], decoded);
      bank[e].copy_(in_turn ? gate_rows_first(matrix) : matrix);
    }
    return bank;
  }

  void read_mxfp4_banks() {
    const Mxfp4 up = take_mxfp4(family_.fused.up, U(), D());
    const Mxfp4 down = take_mxfp4(family_.fused.down, D(), F());
    if (options_.bias) read_bank_biases();
    if (!take_.sound()) return;
    if (!type_) type_ = at::kBFloat16;
    put("experts.up", decode(up, family_.fused.transposed));
    put("experts.down", decode(down, false));
  }

  void read_shared() {
    const std::string& name = family_.shared;
    const Matrices found = take_matrices(
        {name + ".gate_proj.weight", name + ".up_proj.weight", name + ".down_proj.weight"}, options_.shared.ffn);
    if (options_.shared.gated) put("shared_gate.weight", take_.weight(family_.shared_gate, {1, D()}));
    if (!take_.sound()) return;
    const at::Tensor up = make({(gated() ? 2 : 1) * options_.shared.ffn, D()});
    copy_up(found, up);
    put("shared.up", up);
    put("shared.down", found.down);
  }

  const Family& family_;
  const MoEOptions& options_;
  std::optional<at::ScalarType> type_;
  Taker take_;
  Tensors module_;
};

}  // namespace

Tensors to_module(const Config& config, const Tensors& published, std::optional<at::ScalarType> type,
                  const std::string& source) {
  const at::NoGradGuard no_grad;
  return LayerReader(config, published, type).read(source);
}

FoundLayer find_layer(const Config& config, const std::string& folder, int64_t layer) {
  std::string tried;
  for (const std::string& root : layer_roots(config, layer, KeyLayout::per_expert)) {
    std::vector<std::string> spellings{root};
    if (root.starts_with("model.")) spellings.push_back(root.substr(6));  // a model saved without its head
    for (const std::string& spelling : spellings) {
      FoundLayer found{spelling, {}};
      for (auto& [name, tensor] : map_tensors(folder, spelling).tensors)
        found.tensors[name.substr(spelling.size())] = tensor;
      if (!found.tensors.empty()) return found;
      tried.append(tried.empty() ? "'" : "' or '").append(spelling);
    }
  }
  throw FileError(folder + ": holds no tensor whose name starts with " + tried + "'");
}

}  // namespace turnout::pretrained
