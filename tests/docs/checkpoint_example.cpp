// Prints what one layer of a published model computes for random tokens, and which experts it chose.
#include <turnout/pretrained.h>

#include <ATen/ATen.h>

#include <iostream>

int main(int count, char** words) {
  if (count != 2) return 2;
  const std::string folder = words[1];  // config.json and model.safetensors, or an index and its shards
  const auto model = turnout::pretrained_moe(folder);
  const auto layer = model.layers.front();
  auto moe = turnout::load_moe_layer(folder, layer);

  const auto x = at::randn({4, model.options.hidden}).to(moe->experts->parameters()[0].scalar_type());
  const auto out = moe(x);
  std::cout << model.family << ", layer " << layer << ": output " << out.output.sizes() << "\n";
  std::cout << out.routing.topk_ids << "\n";
}
