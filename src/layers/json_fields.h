// Options to JSON and back from one list of fields: the reader refuses what is missing, unknown or of a wrong type.
#pragma once

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <set>
#include <string>
#include <type_traits>

namespace turnout {

/// @throws c10::ValueError saying where the text stops being JSON
inline nlohmann::ordered_json parse_json(const char* what, const std::string& text) {
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(!json.is_discarded(), "turnout: ", what, " are not valid JSON");
  return json;
}

class JsonWriter {
 public:
  template <class T>
  void number(const char* key, T& value) {
    json[key] = value;
  }
  template <class T, class Name, class Parse>
  void word(const char* key, T& value, Name name, Parse) {
    json[key] = name(value);
  }
  template <class Visit>
  void object(const char* key, Visit visit) {
    JsonWriter inner;
    visit(inner);
    json[key] = std::move(inner.json);
  }

  nlohmann::ordered_json json = nlohmann::ordered_json::object();
};

class JsonReader {
 public:
  JsonReader(const nlohmann::ordered_json& json, std::string where) : json_(json), where_(std::move(where)) {
    TORCH_CHECK_VALUE(json.is_object(), "turnout: ", where_, " options are not a JSON object");
  }

  /// Numbers, and true or false.
  template <class T>
  void number(const char* key, T& value) {
    const auto& found = get(key);
    const bool fits = std::is_same_v<T, bool>       ? found.is_boolean()
                      : std::is_floating_point_v<T> ? found.is_number()
                                                    : found.is_number_integer();
    TORCH_CHECK_VALUE(fits, "turnout: option ", where_, ".", key, " is ", found.dump(), ", expected ",
                      std::is_same_v<T, bool>       ? "true or false"
                      : std::is_floating_point_v<T> ? "a number"
                                                    : "a whole number");
    value = found.get<T>();
  }
  template <class T, class Name, class Parse>
  void word(const char* key, T& value, Name, Parse parse) {
    const auto& found = get(key);
    TORCH_CHECK_VALUE(found.is_string(), "turnout: option ", where_, ".", key, " is ", found.dump(),
                      ", expected a word");
    value = parse(found.get<std::string>());
  }
  template <class Visit>
  void object(const char* key, Visit visit) {
    JsonReader inner(get(key), where_ + "." + key);
    visit(inner);
    inner.finish();
  }
  /// After all fields: whatever else stands there is unknown.
  void finish() const {
    for (const auto& [key, value] : json_.items())
      TORCH_CHECK_VALUE(known_.count(key), "turnout: option ", where_, ".", key, " is unknown");
  }

 private:
  const nlohmann::ordered_json& get(const char* key) {
    known_.insert(key);
    const auto found = json_.find(key);
    TORCH_CHECK_VALUE(found != json_.end(), "turnout: option ", where_, ".", key, " is missing");
    return *found;
  }

  const nlohmann::ordered_json& json_;
  std::string where_;
  std::set<std::string> known_;
};

}  // namespace turnout
