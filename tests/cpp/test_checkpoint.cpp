// Files: round trips, atomic replacement, and everything a hostile file may try.
#include <turnout/checkpoint.h>

#include "helpers.h"
#include "safetensors_bytes.h"
#include "tiny_models.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <fstream>

namespace turnout {
namespace {

std::string bytes_of(const std::string& path) { return read_file(path, 1 << 20); }

using testing::file_of;

class Checkpoint : public testing::FolderTest {
 protected:
  /// Message of the FileError that loading these bytes throws; it must name the file.
  std::string refusal(const std::string& bytes) {
    const std::string file = path("hostile.safetensors");
    std::ofstream(file, std::ios::binary) << bytes;
    try {
      load_tensors(file);
    } catch (const FileError& error) {
      EXPECT_EQ(std::string(error.what()).find(file + ": "), 0u) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "loaded: " << bytes.substr(8, 200);
    return "";
  }
};

TEST_F(Checkpoint, RoundTripOfEveryType) {
  TensorFile content;
  content.metadata = {{"a", "b \"quoted\" \xc3\xa9"}, {"step", "12"}};
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                                    at::kChar, at::kByte, at::kBool, at::kUInt64, at::kUInt32, at::kUInt16,
                                    at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kFloat8_e8m0fnu})
    content.tensors[std::string("t.") + c10::toString(type)] =
        at::arange(1, 7).remainder(3).clamp_min(1).sub(type == at::kBool ? 1 : 0).view({2, 3}).to(type);
  content.tensors["scalar"] = at::full({}, 2.5);
  content.tensors["empty"] = at::empty({3, 0, 2});
  content.tensors["transposed"] = at::arange(6.0).view({2, 3}).t();
  content.tensors["row"] = at::arange(6.0).view({2, 3})[1];
  save_tensors(path("x.safetensors"), content);
  const TensorFile back = load_tensors(path("x.safetensors"));
  EXPECT_EQ(back.metadata, content.metadata);
  ASSERT_EQ(back.tensors.size(), content.tensors.size());
  for (const auto& [name, tensor] : content.tensors) {
    EXPECT_EQ(back.tensors.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(back.tensors.at(name).to(at::kDouble), tensor.to(at::kDouble))) << name;
  }
  save_tensors(path("y.safetensors"), back);
  EXPECT_EQ(bytes_of(path("x.safetensors")), bytes_of(path("y.safetensors")));
  EXPECT_FALSE(std::filesystem::exists(path("x.safetensors.partial")));
}

TEST_F(Checkpoint, WhatCannotBeSavedIsNamed) {
  EXPECT_SAYS(save_tensors(path("x"), {{{"z", at::zeros(2, at::kComplexFloat)}}, {}}), "tensor 'z' is ComplexFloat");
  EXPECT_SAYS(save_tensors(path("x"), {{{"z", at::Tensor()}}, {}}), "tensor 'z' is undefined");
  EXPECT_SAYS(save_tensors(path("x"), {{{"__metadata__", at::zeros(2)}}, {}}), "called '__metadata__'");
  EXPECT_SAYS(save_tensors(path("none/x"), {{{"z", at::zeros(2)}}, {}}), path("none/x").c_str());
  EXPECT_FALSE(std::filesystem::exists(path("x")));
}

TEST_F(Checkpoint, HostileFilesAreRefusedByNameAndTensor) {
  const auto entry = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const auto says = [&](const std::string& bytes, const char* words) {
    const std::string message = refusal(bytes);
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  says("", "not a safetensors file: it has 0 bytes");
  says("PK\x03\x04 some zip archive", "not a safetensors file: its header claims");
  says(std::string(8, '\xff') + "{}", "header claims");
  says(file_of("{}").substr(0, 9), "is truncated");
  says(file_of("[]"), "no JSON object");
  says(file_of("{\"w\":"), "no JSON object");
  says(file_of(std::string(100000, '[')), "no JSON object");
  says(file_of(std::string(1000, '[') + std::string(1000, ']')), "no JSON object");
  says(file_of("{}", 4), "holds 4 bytes of data, its tensors need 0");
  says(file_of("{\"__metadata__\":{\"a\":1}}"), "__metadata__ 'a' is no text");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1]"), 4), "tensor 'w' lacks");
  says(file_of(entry("\"dtype\":\"F4\",\"shape\":[8],\"data_offsets\":[0,4]"), 4),
       "tensor 'w' has the unknown dtype");
  says(file_of(entry("\"dtype\":7,\"shape\":[4],\"data_offsets\":[0,4]"), 4), "tensor 'w' has the unknown dtype 7");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]"), 4), "the size -1");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]"), 4), "the size 1.5");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":3,\"data_offsets\":[0,4]"), 4), "a shape that is no list");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]"), 4), "too large");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[0,9223372036854775807,9],\"data_offsets\":[0,0]")), "too large");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1000000000000],\"data_offsets\":[0,4]"), 4), "need 4000000000000");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]"), 4), "has 4 bytes of data");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]"), 4), "the file holds 4 bytes");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,4]"), 8), "data_offsets [8,4]");
  says(file_of(entry("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]"), 8), "leaves a gap");
  const std::string w = "\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}";
  says(file_of("{" + w + ",\"v\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}", 6), "tensor 'v' overlaps");
  says(file_of("{" + w + "," + w + "}", 4), "tensor 'w' stands in the header twice");
  says(file_of("{" + w + "} {}", 4), "no JSON object");
  says(file_of("{\"w\":7}"), "tensor 'w' lacks");
  says(file_of("{\"__metadata__\":[]}"), "its __metadata__ is no JSON object");
  says(file_of("{\"__metadata__\":{\"a\":\"b\",\"a\":\"c\"}}"), "its __metadata__ 'a' stands there twice");
  says(file_of("{\"__metadata__\":{},\"__metadata__\":{}}"), "stands in the header twice");
  says(file_of("{\"__metadata__\":{\"a\":{}}}"), "__metadata__ 'a' is no text");
  const std::string u8 = "\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]";
  says(file_of(entry(u8 + ",\"dtype\":\"I8\""), 4), "has the field 'dtype' twice");
  says(file_of(entry(u8 + ",\"strides\":[1]"), 4), "has the unknown field 'strides'");
  says(file_of(entry("\"dtype\":\"U8\",\"shape\":[[4]],\"data_offsets\":[0,4]"), 4), "the size a list in its shape");
  says(file_of(entry("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]"), 4), "no pair of whole numbers");
  says(file_of(entry("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,1e400]"), 4), "no JSON object");
  says(file_of(entry("\"dtype\":{},\"shape\":[4],\"data_offsets\":[0,4]"), 4), "has the unknown dtype an object");
  std::string many = "1";
  for (int i = 0; i < 64; ++i) many += ",1";
  says(file_of(entry("\"dtype\":\"U8\",\"shape\":[" + many + "],\"data_offsets\":[0,1]"), 1), "at most 64 sizes");
  says(file_of("{\"" + std::string(1000, 'n') + "\":7}"), "n…' lacks");
  const std::string bools = "{\"w\":{\"dtype\":\"BOOL\",\"shape\":[2],\"data_offsets\":[0,2]}}";
  says(file_of(bools, 0) + std::string("\x01\x02"), "'w' is BOOL and holds bytes that are neither 0 nor 1");
}

TEST_F(Checkpoint, NoTruncationAndNoFlippedBitEndsInAnythingButAFileError) {
  save_tensors(path("x"), {{{"weight", at::arange(6.0)}, {"bias", at::zeros({2, 2})}}, {{"k", "v"}}});
  const std::string whole = bytes_of(path("x"));
  for (size_t length = 0; length < whole.size(); ++length) refusal(whole.substr(0, length));
  for (size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    std::ofstream(path("damaged"), std::ios::binary) << damaged;
    try {
      load_tensors(path("damaged"));
    } catch (const FileError&) {
    }
  }
}

TEST_F(Checkpoint, MissingFilesAndFoldersAreNamed) {
  EXPECT_SAYS(load_tensors(path("none")), (path("none") + ": cannot read").c_str());
  EXPECT_SAYS(load_tensors(folder), "holds neither model.safetensors nor model.safetensors.index.json");
  EXPECT_SAYS(load_tensors("/dev/null"), "not a regular file");
  EXPECT_SAYS(read_file(path("none"), 10), "cannot read");
  write_file(path("long"), "12345678901");
  EXPECT_SAYS(read_file(path("long"), 10), "has 11 bytes, expected at most 10");
}

TEST_F(Checkpoint, AFullDiskLeavesTheOldFile) {
  write_file(path("x"), "old");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{4096, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = testing::message_of([&] { save_tensors(path("x"), {{{"w", at::zeros(100000)}}, {}}); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(message.find(path("x") + ": cannot write: "), std::string::npos) << message;
  EXPECT_EQ(bytes_of(path("x")), "old");
  EXPECT_FALSE(std::filesystem::exists(path("x.partial")));
}

TEST_F(Checkpoint, NothingIsSeenBeforeCommit) {
  write_file(path("x"), "old");
  {
    AtomicFile file(path("x"));
    file.write("new", 3);
    EXPECT_EQ(bytes_of(path("x")), "old");
    EXPECT_SAYS(AtomicFile(path("x")), "another process is writing it");
  }
  EXPECT_EQ(bytes_of(path("x")), "old");
  EXPECT_FALSE(std::filesystem::exists(path("x.partial")));
  std::ofstream(path("x.partial")) << "left behind by a killed process";
  write_file(path("x"), "new");
  EXPECT_EQ(bytes_of(path("x")), "new");
}

TEST_F(Checkpoint, WhatIsNoRegularFileIsNotReplaced) {
  ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
  std::filesystem::create_symlink(path("pipe"), path("link"));
  for (const char* name : {"pipe", "link"})
    EXPECT_SAYS(write_file(path(name), "new"), path(name) + ": cannot be replaced by a file: is a device, pipe or socket");
  EXPECT_SAYS(write_file(path("."), "new"), "is a folder");
  EXPECT_TRUE(std::filesystem::is_fifo(path("pipe")) && std::filesystem::is_symlink(path("link")));
  EXPECT_FALSE(std::filesystem::exists(path("pipe.partial")));
}

TEST_F(Checkpoint, AModelThatDoesNotFitListsEverything) {
  ByteLanguageModel model = testing::tiny_model(testing::tiny_options());
  auto tensors = module_tensors(*model);
  const at::Tensor before = model->head->weight.detach().clone();
  for (auto& item : tensors) item.second = item.second.detach() + 1;
  tensors["extra"] = at::zeros(1);
  tensors.erase("norm.bias");
  tensors["norm.weight"] = at::zeros(3);
  tensors["layer_1.moe.experts.up"] = tensors["layer_1.moe.experts.up"].to(at::kDouble);
  const std::string message = testing::message_of([&] { load_into_module(*model, tensors, "file.x"); });
  for (const char* words : {"file.x: ", "'extra' is unused", "'norm.bias' is missing",
                            "'norm.weight' is Float [3], expected Float [16]", "'layer_1.moe.experts.up' is Double"})
    EXPECT_NE(message.find(words), std::string::npos) << words << "\n" << message;
  EXPECT_TRUE(at::equal(model->head->weight, before)) << "nothing may be copied unless all fit";
}

TEST_F(Checkpoint, BuffersAreSavedAndLoadedAsParametersAre) {
  struct Counted : torch::nn::Module {
    Counted() : weight(register_parameter("weight", at::ones(2))), bias(register_buffer("bias", at::zeros(3))) {}
    at::Tensor weight, bias;
  };
  Counted first, second;
  first.bias.fill_(7);
  load_into_module(second, module_tensors(first), "first");
  EXPECT_TRUE(at::equal(second.bias, at::full(3, 7.0)));
  auto tensors = module_tensors(first);
  tensors.erase("bias");
  EXPECT_SAYS(load_into_module(second, tensors, "first"), "'bias' is missing");
}

TEST_F(Checkpoint, ModelsComeBackToTheSameBits) {
  for (const BlockKind kind : {BlockKind::dense, BlockKind::moe, BlockKind::hybrid}) {
    ByteLanguageModel model = testing::tiny_model(testing::tiny_options(kind));
    save_model(model, folder);
    ByteLanguageModel back = load_model(folder);
    const at::Tensor tokens = at::arange(8).unsqueeze(0);
    EXPECT_TRUE(at::equal(model(tokens).logits, back(tokens).logits));
  }
}

TEST_F(Checkpoint, APairOfFilesThatDoesNotBelongTogetherIsNoticed) {
  LanguageModelOptions options = testing::tiny_options();
  save_model(testing::tiny_model(options), folder);
  options.moe.top_k = 1;  // the same shapes
  write_file(path("config.json"), to_json(options) + "\n");
  EXPECT_SAYS(load_model(folder), "was saved with other options");
  write_file(path("config.json"), "{\"layers\": 2}");
  EXPECT_SAYS(load_model(folder), (path("config.json") + ": ").c_str());
}

}  // namespace
}  // namespace turnout
