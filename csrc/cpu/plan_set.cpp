// What a plan is told of a parameter.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/on_demand.h"
#include "cpu/plan.h"
#include "cpu/take.h"

namespace fasttrain {

bool Plan::Number::take(const dlpack::Tensor& tensor) {
  kind = Kind(tensor);
  at = address(tensor);
  return kind.storage() >= 0 && !kind.complex() && kind.device.type == dlpack::kCPU && Layout(tensor).elements() == 1;
}

// A running number that is missing, or no plain tensor: Python says what is wrong with it.
bool Plan::has_numbers(const py::dict& state, const py::tuple& running) const {
  return running.size() <= kMaxRunning && std::all_of(running.begin(), running.end(), [&](py::handle key) {
           return state.contains(key) && reader_.local(state[key]).is_none();
         });
}

bool Plan::set(int index, int rule, bool wide, py::dict state, const py::tuple& keys, bool counted, bool fresh,
               const py::object& kept, const py::tuple& running) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  const RuleKernels& kernels = rule_at(rule);
  entry.arrays = nullptr;
  entry.running = static_cast<int>(running.size());
  entry.ready = entry.active = divided_ = placed_ = false;
  entry.kept = 0;  // those of `tensors` that are set, also where the rest is refused
  if (!has_numbers(state, running)) return false;
  if (!kept.is_none()) {
    if (!set_arrays(entry, kernels, wide, state, keys, counted, kept.cast<py::tuple>(), running)) return false;
    entry.fresh = fresh;
    any_fresh_ |= fresh;
    entry.ready = entry.active = any_arrays_ = true;
    hold(entry, entry.param.attr("grad"));
    return true;
  }
  if (static_cast<int>(keys.size()) != kernels.states + (counted ? 1 : 0))
    throw std::invalid_argument(std::string(kernels.name) + " has " + std::to_string(kernels.states) + " states");
  entry.state = state;
  dlpack::Tensor now;
  if (!reader_.read(entry.param, &now)) return false;
  const Kind param = entry.kinds[0] = Kind(now);
  entry.layout = Layout(now);
  if (!entry.layout.dense() || !take(entry.work, 0, now, entry.layout, param)) return false;
  const py::object grad = entry.param.attr("grad");
  if (!reader_.read_gradient(grad, entry.param, &now) || !take(entry.work, 1, now, entry.layout, param)) return false;
  entry.kinds[1] = Kind(now);
  entry.work.counter = Counter();
  const int own = static_cast<int>(keys.size());
  for (int i = 0; i < own + entry.running; ++i) {
    entry.keys[i] = i < own ? keys[static_cast<size_t>(i)] : running[static_cast<size_t>(i - own)];
    entry.tensors[i] = state[entry.keys[i]];
    entry.kept = i + 1;
    if (!reader_.read(entry.tensors[i], &now)) return false;
    entry.kinds[2 + i] = Kind(now);
    if (i < kernels.states) {
      if (!take(entry.work, 2 + i, now, entry.layout, param)) return false;
    } else if (i >= own) {
      if (!entry.numbers[i - own].take(now)) return false;
    } else {
      entry.work.counter = {counter_type(now), address(now)};
      if (entry.work.counter.type == Counter::kNone || now.ndim != 0) return false;
    }
  }
  prepare(entry.work, kernels, wide, entry.layout, param);
  entry.fresh = fresh;
  any_fresh_ |= fresh;
  grads_.push_back(grad);
  entry.ready = entry.active = true;
  return true;
}

// False if its tensors cannot be walked; then the entry is not ready, and what was set of it does not matter.
bool Plan::set_arrays(Entry& entry, const RuleKernels& rule, bool wide, py::dict state, const py::tuple& keys,
                      bool counted, const py::tuple& kept, const py::tuple& running) {
  const auto codecs = kept[0].cast<std::vector<int>>();
  const auto extra_keys = kept[1].cast<py::tuple>();
  const bool averaged = kept[2].cast<bool>();
  const size_t own = static_cast<size_t>(rule.states) + (averaged ? 1 : 0);
  if (keys.size() != own + (counted ? 1 : 0) || extra_keys.size() != 2 + own)
    throw std::invalid_argument(std::string(rule.name) + " has " + std::to_string(rule.states) +
                                " states: a key for each, for the EMA and for the step count, a second for each codec");
  auto arrays = std::make_unique<Arrays>();
  describe(&arrays->kept, rule, wide, codecs, kept[3].cast<bool>(), kept[5].cast<std::tuple<i64, i64, i64>>());
  arrays->identity = kept[4].cast<u64>();
  arrays->watched = kept[6].cast<bool>();
  arrays->random = std::any_of(codecs.begin(), codecs.end(), [](int codec) { return (codec & kStochastic) != 0; });

  entry.state = state;
  entry.work.counter = Counter();
  Work& work = entry.work;
  Kept& to = arrays->kept;
  dlpack::Tensor now;
  if (!reader_.read(entry.param, &now)) return false;
  entry.kinds[0] = Kind(now);
  entry.layout = Layout(now);
  if (!walkable(to, entry.layout) || !take_main(to, 0, now, entry.layout)) return false;
  work.streams[0].at = to.operands[0].main;
  const py::object grad = entry.param.attr("grad");
  if (!reader_.read_gradient(grad, entry.param, &now) || !take_main(to, 1, now, entry.layout)) return false;
  entry.kinds[1] = Kind(now);
  work.streams[1] = {to.operands[1].main, to.operands[1].codec};
  const auto add = [&](const py::object& key, char** at) {
    arrays->all.push_back({key, state[key], Kind(), Layout(), at});
    Arrays::Array& array = arrays->all.back();
    if (!reader_.read(array.tensor, &now)) return false;
    array.kind = Kind(now);
    array.layout = Layout(now);
    return true;
  };
  for (int o = 0; o < to.count; ++o) {
    Operand& operand = to.operands[o];
    const py::object extra = extra_keys[static_cast<size_t>(o)];
    if (extra.is_none() != (extra_size(operand.codec) == 0))
      throw std::invalid_argument("operand " + std::to_string(o) + " of codec " + std::to_string(operand.codec) +
                                  (extra.is_none() ? " has a second array: give its key" : " has no second array"));
    if (o >= 2 && (!add(keys[static_cast<size_t>(o - 2)], &operand.main) || !take_main(to, o, now, entry.layout)))
      return false;
    if (!extra.is_none() && (!add(extra, &operand.extra) || !take_extra(to, o, now, entry.layout))) return false;
  }
  if (counted) {
    if (!add(keys[own], &work.counter.at)) return false;
    work.counter = {counter_type(now), address(now)};
    if (work.counter.type == Counter::kNone || now.ndim != 0) return false;
  }
  for (size_t i = 0; i < running.size(); ++i)
    if (!add(running[i], &entry.numbers[i].at) || !entry.numbers[i].take(now)) return false;
  if (arrays->watched) arrays->version = reader_.version(entry.param);
  prepare(work, rule, wide, entry.layout, entry.kinds[0]);
  work.kept_kernel = wide ? kept_kernels().wide : kept_kernels().narrow;
  entry.arrays = std::move(arrays);
  work.kept = &entry.arrays->kept;
  return true;
}

}  // namespace fasttrain
