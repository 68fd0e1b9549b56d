// The choice, by CPUID, once; the environment can name another.
#include "table.h"

#include <cstdlib>
#include <stdexcept>

#include "stages.h"

namespace turnout::kernels {
namespace {

/// The first feature that this machine lacks for `name`, or "" where it can run.
std::string missing([[maybe_unused]] std::string_view name) {
#if defined(TURNOUT_KERNELS_X86)
  __builtin_cpu_init();
#define TURNOUT_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return feature
  if (name == "avx512_bf16" || name == "avx512" || name == "avx2") {
    TURNOUT_NEED("avx2");
    TURNOUT_NEED("fma");
    TURNOUT_NEED("bmi");
    TURNOUT_NEED("bmi2");
    TURNOUT_NEED("f16c");
    TURNOUT_NEED("lzcnt");
    TURNOUT_NEED("movbe");
  }
  if (name == "avx512_bf16" || name == "avx512") {
    TURNOUT_NEED("avx512f");
    TURNOUT_NEED("avx512bw");
    TURNOUT_NEED("avx512cd");
    TURNOUT_NEED("avx512dq");
    TURNOUT_NEED("avx512vl");
  }
  if (name == "avx512_bf16") TURNOUT_NEED("avx512bf16");
#undef TURNOUT_NEED
#endif
  return "";
}

/// Why this machine is better served by a later implementation than by `name`, or "".
std::string slower_here([[maybe_unused]] std::string_view name) {
#if defined(TURNOUT_KERNELS_X86)
  // 64 flops every other cycle; two multiply-adds of fp32 make as many in each
  if (name == "avx512_bf16" && __builtin_cpu_is("intel"))
    return "slower than avx512 on Intel, whose dot product of bf16 pairs has half the rate of fp32 multiply-adds";
#endif
  return "";
}

std::string known_names() {
  std::string names;
  for (const Implementation& i : implementations()) names += (names.empty() ? "" : ", ") + std::string(i.name);
  return names;
}

const Implementation& choose() {
  if (const char* forced = std::getenv("TURNOUT_FORCE_ISA")) {
    try {
      return find(forced);
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument(std::string("TURNOUT_FORCE_ISA: ") + e.what());
    }
  }
  for (const Implementation& i : implementations())
    if (!i.by_force_only && missing(i.name).empty() && slower_here(i.name).empty()) return i;
  return implementations().back();
}

}  // namespace

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> list = {
#if defined(TURNOUT_KERNELS_X86)
    {"avx512_bf16", "AVX-512 F, BW, CD, DQ, VL and BF16", &kAvx512Bf16Stages, false},
    {"avx512", "AVX-512 F, BW, CD, DQ, VL", &kAvx512Stages, false},
    {"avx2", "AVX2, FMA, BMI2", &kAvx2Stages, false},
#endif
    {"portable", "any CPU", &kPortableStages, false},
    {"reference", "any CPU", nullptr, true},
  };
  return list;
}

const Implementation& find(std::string_view name) {
  for (const Implementation& i : implementations()) {
    if (name != i.name) continue;
    const std::string feature = missing(name);
    if (!feature.empty())
      throw std::invalid_argument("'" + std::string(name) + "' needs " + i.needs +
                                  ": this CPU or its operating system lacks " + feature);
    return i;
  }
  throw std::invalid_argument("no implementation is called '" + std::string(name) + "'; known: " + known_names());
}

const Implementation& active() {
  static const Implementation& chosen = choose();  // where it throws, the next use tries again
  return chosen;
}

std::vector<Candidate> report() {
  std::vector<Candidate> lines;
  const Implementation& chosen = active();
  for (const Implementation& i : implementations()) {
    const std::string feature = missing(i.name);
    std::string why;
    if (&i == &chosen)
      why = "";
    else if (!feature.empty())
      why = std::string("needs ") + i.needs + ": this machine lacks " + feature;
    else if (std::getenv("TURNOUT_FORCE_ISA"))
      why = std::string("TURNOUT_FORCE_ISA names ") + chosen.name;
    else if (i.by_force_only)
      why = "runs only when TURNOUT_FORCE_ISA names it";
    else if (!slower_here(i.name).empty())
      why = slower_here(i.name);
    else
      why = std::string("slower than ") + chosen.name;
    lines.push_back({&i, why});
  }
  return lines;
}

}  // namespace turnout::kernels
