// Damage to bytes and to JSON text, drawn from a seeded generator.
#pragma once

#include <random>
#include <string>

namespace turnout::fuzz {

using Random = std::mt19937_64;

/// A number below n.
size_t below(Random& random, size_t n);

/// Flipped bits, bytes put in, taken out, doubled, swapped; the end cut off.
std::string mutate_bytes(std::string bytes, Random& random);

/// As mutate_bytes, or words of JSON replaced by others that a reader may stumble over.
std::string mutate_json(std::string text, Random& random);

/// A safetensors file with damage in its header, its length or its data; the length is set right in half of the cases.
std::string mutate_safetensors(const std::string& file, Random& random);

}  // namespace turnout::fuzz
