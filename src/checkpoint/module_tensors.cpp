// Parameters and buffers of a module to named tensors and back: all or nothing.
#include <turnout/checkpoint.h>

#include <sstream>

namespace turnout {
namespace {

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

}  // namespace

std::map<std::string, at::Tensor> module_tensors(const torch::nn::Module& module) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& item : module.named_parameters()) tensors.emplace(item.key(), item.value());
  for (const auto& item : module.named_buffers()) tensors.emplace(item.key(), item.value());
  return tensors;
}

void load_into_module(torch::nn::Module& module, const std::map<std::string, at::Tensor>& tensors,
                      const std::string& source) {
  const std::map<std::string, at::Tensor> own = module_tensors(module);
  std::string problems;
  const auto add = [&](const std::string& problem) { problems += (problems.empty() ? "" : "; ") + problem; };
  for (const auto& [name, tensor] : own) {
    const auto found = tensors.find(name);
    if (found == tensors.end())
      add("'" + name + "' is missing");
    else if (found->second.sizes() != tensor.sizes() || found->second.scalar_type() != tensor.scalar_type())
      add("'" + name + "' is " + describe(found->second) + ", expected " + describe(tensor));
  }
  for (const auto& item : tensors)
    if (!own.count(item.first)) add("'" + item.first + "' is unused");
  if (!problems.empty()) throw FileError(source + ": does not fit the model: " + problems);

  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : own) tensor.copy_(tensors.at(name));
}

}  // namespace turnout
