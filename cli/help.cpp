// The look of --help: descriptions broken so that they end within 80 columns.
#include "commands.h"
#include "style.h"

#include <iterator>
#include <memory>
#include <sstream>

namespace turnout::cli {
namespace {

class Help : public CLI::Formatter {
 public:
  std::string make_option_desc(const CLI::Option* option) const override { return broken(option->get_description()); }

  std::string make_subcommand(const CLI::App* app) const override {
    std::ostringstream out;
    CLI::detail::format_help(out, app->get_name(), broken(app->get_description()), get_column_width());
    return out.str();
  }

 private:
  std::string broken(const std::string& description) const {
    std::istringstream stream(description);
    const std::vector<std::string> words{std::istream_iterator<std::string>(stream), {}};
    std::string text = wrap("", words, kLineWidth - get_column_width());
    text.pop_back();  // the line's end
    return text;
  }
};

}  // namespace

std::shared_ptr<CLI::FormatterBase> help_format() { return std::make_shared<Help>(); }

}  // namespace turnout::cli
