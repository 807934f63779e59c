#include "cpu/on_demand.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace fasttrain {
namespace {

std::vector<const RuleKernels*> loaded;  // in the shared objects, which stay

// Why the rule cannot be used, or "".
std::string refusal(const OnDemand* found, const std::string& name, u32 digest) {
  if (found == nullptr) return std::string("it exports no ") + kExported;
  if (found->rule_bytes != sizeof(RuleKernels) || found->stream_bytes != sizeof(Stream) ||
      found->headers != std::string(headers()))
    return "it was compiled for another build";
  const std::string isa = chosen_kernels().isa;
  if (found->isa != isa) return std::string("it was compiled for ") + found->isa + ", and " + isa + " is in use";
  if (found->rule->name != name || found->rule->digest != digest) return "it holds another rule";
  return "";
}

}  // namespace

const char* headers() { return FT_HEADERS; }

int load_rule(const char* path, const char* name, u32 digest) {
  void* object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) throw std::runtime_error(std::string("it cannot be loaded: ") + dlerror());
  const std::string refused = refusal(static_cast<const OnDemand*>(dlsym(object, kExported)), name, digest);
  if (!refused.empty()) {
    dlclose(object);
    throw std::runtime_error(std::string(path) + " is refused: " + refused);
  }
  loaded.push_back(static_cast<const OnDemand*>(dlsym(object, kExported))->rule);
  return chosen_kernels().count + static_cast<int>(loaded.size()) - 1;
}

const RuleKernels& rule_at(int rule) {
  const IsaKernels& built = chosen_kernels();
  if (rule < 0 || rule >= built.count + static_cast<int>(loaded.size()))
    throw std::out_of_range("no rule " + std::to_string(rule));
  return rule < built.count ? built.rules[rule] : *loaded[static_cast<size_t>(rule - built.count)];
}

}  // namespace fasttrain
