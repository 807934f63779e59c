#include "cpu/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/on_demand.h"
#include "cpu/reduce_bind.h"
#include "cpu/take.h"
#include "draws.h"

namespace fasttrain {
namespace {

constexpr size_t kDistance = 4;  // entries between two stages of fetching ahead
constexpr size_t kBlock = 16;    // parameters whose versions are incremented together

PyObject* look_up(py::handle dict, py::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;  // borrowed, or nullptr
}

Counter::Type counter_type(const dlpack::Tensor& tensor) {
  const dlpack::DataType& type = tensor.dtype;
  if (Layout(tensor).elements() != 1 || tensor.device.type != dlpack::kCPU || type.lanes != 1) return Counter::kNone;
  if (type.code == dlpack::kFloat)
    return type.bits == 32 ? Counter::kFloat32 : type.bits == 64 ? Counter::kFloat64 : Counter::kNone;
  if (type.code == dlpack::kInt)
    return type.bits == 32 ? Counter::kInt32 : type.bits == 64 ? Counter::kInt64 : Counter::kNone;
  return Counter::kNone;
}

// Takes one of p, g and the states into the work of a parameter. False if the kernels cannot.
bool take(Work& work, int stream, const dlpack::Tensor& tensor, const Layout& layout, const Kind& param) {
  const Kind kind(tensor);
  if (kind.storage() < 0 || kind.complex() != param.complex() || kind.device.type != dlpack::kCPU ||
      !layout.matches(tensor))
    return false;
  work.streams[stream] = {address(tensor), static_cast<u8>(kind.storage())};
  return true;
}

void prepare(Work& work, const RuleKernels& rule, bool wide, const Layout& layout, const Kind& param) {
  work.rule = &rule;
  work.kept = nullptr;
  work.kernel = wide ? rule.wide : rule.narrow;
  work.elements = layout.elements() * (param.complex() ? 2 : 1);  // a complex number is two reals
}

py::object attribute(py::handle object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  if (!found) throw py::error_already_set();
  return found;
}

// Whether two DTensors have their parts in the same places. Equal meshes that are not the same object are left to Python.
bool placed_alike(py::handle a, py::handle b) {
  static PyObject* const spec = PyUnicode_InternFromString("_spec");
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  const py::object one = attribute(a, spec), other = attribute(b, spec);
  if (one.is(other)) return true;
  return attribute(one, mesh).is(attribute(other, mesh)) &&
         attribute(one, placements).equal(attribute(other, placements));
}

}  // namespace

Reader::Reader(const py::capsule& exchange, py::tuple types, py::object sharded)
    : types_(std::move(types)), sharded_(std::move(sharded)) {
  api_ = exchange.get_pointer<const dlpack::ExchangeApi>();
  is_neg_ = types_[0].attr("is_neg");
  ahead_ = Ahead(types_[0]());
  if (api_->major != dlpack::kMajor || api_->tensor_from_object == nullptr)
    throw std::runtime_error("this torch publishes DLPack " + std::to_string(api_->major) + "." +
                             std::to_string(api_->minor) + "; this build of fasttrain reads major version 1");
}

bool Reader::read(py::handle tensor, dlpack::Tensor* out) const {
  for (py::handle type : types_) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) != type.ptr()) continue;
    if (api_->tensor_from_object(tensor.ptr(), out) != 0) {
      PyErr_Clear();  // sparse, or on a device that DLPack does not know: the caller says what is wrong with it
      return false;
    }
    if (out->data != nullptr) return true;
    for (int i = 0; i < out->ndim; ++i)  // no memory: nothing to point to, or freed under a tensor that is still there
      if (out->shape[i] == 0) return true;
    return false;
  }
  const py::object part = local(tensor);
  return !part.is_none() && !sharded(part) && read(part, out);
}

py::object Reader::local(py::handle tensor) const {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return sharded(tensor) ? attribute(tensor, name) : py::none();
}

i64 Reader::version(py::handle tensor) const {
  const py::object part = local(tensor);
  return version_of(tensor) + (part.is_none() ? 0 : version_of(part));
}

bool Reader::read_gradient(py::handle tensor, py::handle param, dlpack::Tensor* out) const {
  if (sharded(tensor) != sharded(param) || (sharded(param) && !placed_alike(tensor, param)) || !read(tensor, out))
    return false;
  const py::object part = local(tensor);
  PyObject* arguments[] = {part.is_none() ? tensor.ptr() : part.ptr()};
  const auto negated = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), arguments, 1, nullptr));
  if (!negated) throw py::error_already_set();
  return negated.ptr() == Py_False;
}

bool Kind::matches(const dlpack::Tensor& tensor) const {
  return dtype.code == tensor.dtype.code && dtype.bits == tensor.dtype.bits && dtype.lanes == tensor.dtype.lanes &&
         device.type == tensor.device.type && device.index == tensor.device.index;
}

int Kind::storage() const {
  if (dtype.lanes != 1) return -1;
  const int bits = complex() ? dtype.bits / 2 : dtype.bits;
  if (dtype.code == dlpack::kFloat || complex()) return bits == 32 ? kF32 : bits == 64 ? kF64 : bits == 16 ? kF16 : -1;
  return dtype.code == dlpack::kBfloat && bits == 16 ? kBF16 : -1;
}

Layout::Layout(const dlpack::Tensor& tensor)
    : sizes(tensor.shape, tensor.shape + tensor.ndim), strides(tensor.strides, tensor.strides + tensor.ndim) {}

bool Layout::matches(const dlpack::Tensor& tensor) const {
  if (static_cast<int>(sizes.size()) != tensor.ndim) return false;
  bool empty = false, same = true;  // where there is no element, any strides will do
  for (int i = 0; i < tensor.ndim; ++i) {
    if (sizes[i] != tensor.shape[i]) return false;
    empty |= sizes[i] == 0;
    same &= strides[i] == tensor.strides[i] || sizes[i] <= 1;
  }
  return same || empty;
}

void Layout::fetch() const {
  Ahead::lines(reinterpret_cast<const char*>(sizes.data()), 1);
  Ahead::lines(reinterpret_cast<const char*>(strides.data()), 1);
}

bool Layout::dense() const {
  std::vector<std::pair<i64, i64>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] != 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  i64 expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool Layout::contiguous() const {
  i64 expected = 1;
  bool same = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] == 0) return true;
    same &= sizes[i] == 1 || strides[i] == expected;
    expected *= sizes[i];
  }
  return same;
}

i64 Layout::elements() const {
  i64 count = 1;
  for (i64 size : sizes) count *= size;
  return count;
}

namespace {

// Whether g or a state, read just after its parameter, has the parameter's sizes and strides.
bool alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  bool empty = false, same = true;  // where there is no element, any strides will do
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    empty |= a.shape[i] == 0;
    same &= a.strides[i] == b.strides[i] || a.shape[i] <= 1;
  }
  return same || empty;
}

}  // namespace

Plan::Plan(Reader reader, const std::vector<py::list>& groups) : reader_(std::move(reader)), ahead_(reader_.ahead()) {
  for (size_t group = 0; group < groups.size(); ++group) {
    group_sizes_.push_back(groups[group].size());
    for (py::handle param : groups[group]) {
      Entry entry;
      entry.param = py::reinterpret_borrow<py::object>(param);
      entry.group = static_cast<int>(group);
      entries_.push_back(std::move(entry));
    }
  }
}

// True if the entry can be stepped as it was described; takes its pointers.
bool Plan::patch(Entry& entry, py::handle grad, py::handle state) {
  if (!entry.ready) return false;
  Work& work = entry.work;
  dlpack::Tensor param, now;
  if (!reader_.read(entry.param, &param) || !entry.kinds[0].matches(param) || !entry.layout.matches(param)) return false;
  if (!reader_.read_gradient(grad, entry.param, &now) || !entry.kinds[1].matches(now) || !alike(param, now)) return false;
  placed_ &= work.streams[0].at == address(param);
  work.streams[0].at = address(param);
  if (entry.arrays != nullptr && entry.arrays->kept.zero) placed_ &= work.streams[1].at == address(now);
  work.streams[1].at = address(now);
  if (state.ptr() != entry.state.ptr() && (entry.kept != 0 || entry.arrays != nullptr)) return false;
  if (entry.arrays != nullptr) return patch_arrays(entry);
  for (int i = 0; i < entry.kept; ++i) {
    PyObject* tensor = look_up(entry.state, entry.keys[i]);
    if (tensor != entry.tensors[i].ptr() || !reader_.read(tensor, &now) || !entry.kinds[2 + i].matches(now)) return false;
    if (i < work.rule->states) {
      if (!alike(param, now)) return false;
      placed_ &= work.streams[2 + i].at == address(now);
      work.streams[2 + i].at = address(now);
    } else {
      if (now.ndim != 0) return false;
      work.counter.at = address(now);
    }
  }
  return true;
}

bool Plan::patch_arrays(Entry& entry) {
  Arrays& arrays = *entry.arrays;
  arrays.kept.operands[0].main = entry.work.streams[0].at;
  arrays.kept.operands[1].main = entry.work.streams[1].at;
  dlpack::Tensor now;
  for (Arrays::Array& array : arrays.all) {
    PyObject* tensor = look_up(entry.state, array.key);
    if (tensor != array.tensor.ptr() || !reader_.read(tensor, &now) || !array.kind.matches(now) ||
        !array.layout.matches(now))
      return false;
    placed_ &= *array.at == address(now);
    *array.at = address(now);
  }
  return !arrays.watched || reader_.version(entry.param) == arrays.version;
}

// Three stages, each for an entry nearer to its turn: what the entry points to, then what that points to. Arrays lie one
// pointer further away.
void Plan::fetch_ahead(size_t index) const {
  if (any_arrays_) fetch_arrays_ahead(index);
  if (index + 3 * kDistance < entries_.size()) {
    const Entry& entry = entries_[index + 3 * kDistance];
    ahead_.object(entry.param);
    ahead_.object(entry.state);
    for (int i = 0; i < entry.kept; ++i) ahead_.object(entry.tensors[i]);
    entry.last_grad.fetch();
  }
  if (index + 2 * kDistance < entries_.size() && entries_[index + 2 * kDistance].ready) {
    const Entry& entry = entries_[index + 2 * kDistance];
    entry.layout.fetch();
    ahead_.tensor(entry.param);
    if (entry.kept != 0) ahead_.dict(entry.state);
    for (int i = 0; i < entry.kept; ++i) ahead_.tensor(entry.tensors[i]);
  }
  if (index + kDistance < entries_.size() && entries_[index + kDistance].ready) {
    const Entry& entry = entries_[index + kDistance];
    ahead_.inside(entry.param);
    for (int i = 0; i < entry.kept; ++i) ahead_.inside(entry.tensors[i]);
    if (entry.work.counter.at != nullptr) Ahead::lines(entry.work.counter.at, 1);
  }
}

void Plan::fetch_arrays_ahead(size_t index) const {
  const auto each = [&](size_t distance, const auto& fetch) {
    if (index + distance < entries_.size() && entries_[index + distance].arrays != nullptr)
      fetch(*entries_[index + distance].arrays);
  };
  each(5 * kDistance, [&](const Arrays& arrays) { Ahead::lines(reinterpret_cast<const char*>(&arrays), 4); });
  each(4 * kDistance, [&](const Arrays& arrays) {
    Ahead::lines(reinterpret_cast<const char*>(arrays.all.data()), static_cast<int>(2 * arrays.all.size()));
  });
  each(3 * kDistance, [&](const Arrays& arrays) {
    for (const Arrays::Array& array : arrays.all) {
      ahead_.object(array.tensor);
      array.layout.fetch();
    }
  });
  each(2 * kDistance, [&](const Arrays& arrays) {
    for (const Arrays::Array& array : arrays.all) ahead_.tensor(array.tensor);
  });
  each(kDistance, [&](const Arrays& arrays) {
    for (const Arrays::Array& array : arrays.all) ahead_.inside(array.tensor);
  });
}

py::object Plan::scan(py::dict state, const std::vector<py::list>& groups) {
  release();
  if (groups.size() != group_sizes_.size()) return py::none();
  for (size_t group = 0; group < groups.size(); ++group)
    if (groups[group].size() != group_sizes_[group]) return py::none();
  static PyObject* const name = PyUnicode_InternFromString("grad");
  py::list attention;
  // States are made in the order of the parameters, most often: walking the dict beside them saves a hash each.
  Py_ssize_t position = 0;
  PyObject *next = nullptr, *next_state = nullptr;
  bool more = PyDict_Next(state.ptr(), &position, &next, &next_state) != 0;
  size_t i = 0;
  for (const py::list& params : groups) {
    for (py::handle param : params) {
      fetch_ahead(i);
      Entry& e = entries_[i];
      if (param.ptr() != e.param.ptr()) return py::none();
      auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), name));
      if (!grad) throw py::error_already_set();
      PyObject* found = nullptr;
      const bool stateful = e.kept != 0 || e.arrays != nullptr;
      if (stateful && more && next == param.ptr()) {
        found = next_state;
        more = PyDict_Next(state.ptr(), &position, &next, &next_state) != 0;
      } else if (stateful) {
        found = look_up(state, param);
      }
      const bool active = !grad.is_none() && patch(e, grad, found);
      if (!grad.is_none() && !active) attention.append(i);
      if (e.active != active) divided_ = false;
      e.active = active;
      if (active) {
        e.last_grad = ahead_.place(grad);
        hold(e, std::move(grad));
      }
      ++i;
    }
  }
  return attention;
}

void Plan::release() {
  grads_.clear();
  if (!zeroed_.empty()) zeroed_ = py::list();
}

void Plan::hold(Entry& entry, py::object grad) {
  if (entry.arrays != nullptr && entry.arrays->kept.zero) zeroed_.append(grad);
  grads_.push_back(std::move(grad));
}

bool Plan::set(int index, int rule, bool wide, py::dict state, const py::tuple& keys, bool counted, bool fresh,
               const py::object& kept) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  const RuleKernels& kernels = rule_at(rule);
  entry.arrays = nullptr;
  if (!kept.is_none()) {
    entry.ready = entry.active = divided_ = placed_ = false;
    entry.kept = 0;
    if (!set_arrays(entry, kernels, wide, state, keys, counted, kept.cast<py::tuple>())) return false;
    entry.fresh = fresh;
    any_fresh_ |= fresh;
    entry.ready = entry.active = any_arrays_ = true;
    hold(entry, entry.param.attr("grad"));
    return true;
  }
  if (static_cast<int>(keys.size()) != kernels.states + (counted ? 1 : 0))
    throw std::invalid_argument(std::string(kernels.name) + " has " + std::to_string(kernels.states) + " states");
  entry.ready = entry.active = divided_ = placed_ = false;
  entry.state = state;
  entry.kept = 0;  // those of `tensors` that are set, also where the rest is refused
  dlpack::Tensor now;
  if (!reader_.read(entry.param, &now)) return false;
  const Kind param = entry.kinds[0] = Kind(now);
  entry.layout = Layout(now);
  if (!entry.layout.dense() || !take(entry.work, 0, now, entry.layout, param)) return false;
  const py::object grad = entry.param.attr("grad");
  if (!reader_.read_gradient(grad, entry.param, &now) || !take(entry.work, 1, now, entry.layout, param)) return false;
  entry.kinds[1] = Kind(now);
  entry.work.counter = Counter();
  for (int i = 0; i < static_cast<int>(keys.size()); ++i) {
    entry.keys[i] = keys[static_cast<size_t>(i)];
    entry.tensors[i] = state[entry.keys[i]];
    entry.kept = i + 1;
    if (!reader_.read(entry.tensors[i], &now)) return false;
    entry.kinds[2 + i] = Kind(now);
    if (i < kernels.states) {
      if (!take(entry.work, 2 + i, now, entry.layout, param)) return false;
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
                      bool counted, const py::tuple& kept) {
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
  if (arrays->watched) arrays->version = reader_.version(entry.param);
  prepare(work, rule, wide, entry.layout, entry.kinds[0]);
  work.kept_kernel = wide ? kept_kernels().wide : kept_kernels().narrow;
  entry.arrays = std::move(arrays);
  work.kept = &entry.arrays->kept;
  return true;
}

std::vector<std::pair<int, double>> Plan::rows(bool each) {
  rows_.clear();
  std::vector<int> last(group_sizes_.size(), -1);  // the row of the group's previous parameter, most often the right one
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    const double step = entry.work.counter.type != Counter::kNone ? entry.work.counter.read() + 1 : entry.fresh ? 1 : 2;
    if (each) {
      entry.work.row = static_cast<int>(rows_.size());
      rows_.emplace_back(entry.group, step);
      continue;
    }
    int& row = last[static_cast<size_t>(entry.group)];
    if (row < 0 || rows_[static_cast<size_t>(row)].second != step) {
      const auto found = std::find(rows_.begin(), rows_.end(), std::make_pair(entry.group, step));
      row = static_cast<int>(found - rows_.begin());
      if (found == rows_.end()) rows_.emplace_back(entry.group, step);
    }
    entry.work.row = row;
  }
  return rows_;
}

// What depends on which entries are active: the division of the work, and the lists of what it writes.
void Plan::arrange() {
  division_.clear();
  written_.clear();
  widest_ = 0;
  any_random_ = false;
  i64 listed = 0;
  for (const Entry& entry : entries_) {
    if (!entry.active) continue;
    division_.add(entry.work);
    widest_ = std::max(widest_, 1 + entry.work.rule->coefficients + (entry.arrays != nullptr ? kTail : 0));
    if (listed++ % kBlock == 0) written_.emplace_back();
    list_written(entry.param);
    for (int i = 0; i < entry.kept; ++i) list_written(entry.tensors[i]);
    if (entry.arrays == nullptr) continue;
    for (const Arrays::Array& array : entry.arrays->all) list_written(array.tensor);
    any_random_ |= entry.arrays->random;
  }
  division_.close();
  divided_ = true;
}

void Plan::run(const py::array_t<double, py::array::c_style>& rows, const py::object& keys, int threads,
               const py::function& increment) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(rows_.size()))
    throw std::invalid_argument("one row of coefficients for each of rows() is needed");
  if (!divided_) arrange();
  if (rows.shape(1) < widest_) throw std::invalid_argument("a rule has more coefficients than a row");
  if (any_random_) {
    const auto step_keys = py::array_t<u64, py::array::c_style>::ensure(keys);
    if (keys.is_none() || !step_keys || step_keys.ndim() != 1 || step_keys.shape(0) != rows.shape(0))
      throw std::invalid_argument("a codec is stochastic: one 64-bit key for each row is needed");
    for (Entry& entry : entries_)
      if (entry.active && entry.arrays != nullptr)
        entry.arrays->kept.key = parameter_key(step_keys.data()[entry.work.row], entry.arrays->identity);
  }
  if (!placed_) {
    std::vector<const Work*> works;
    for (const Entry& entry : entries_)
      if (entry.ready) works.push_back(&entry.work);
    one_by_one_ = share_memory(works);
    placed_ = true;
  }
  increment_versions(increment);
  {
    const py::gil_scoped_release release;
    division_.walk(rows.data(), rows.shape(1), one_by_one_ ? 1 : threads);
  }
  if (any_fresh_)
    for (Entry& entry : entries_) entry.fresh = entry.fresh && !entry.active;
  any_fresh_ = false;
  last_ = {division_.parameters != 0 ? 1 : 0, division_.bytes_read, division_.bytes_written, division_.parameters,
           division_.elements};
}

py::dict Plan::last() const {
  return py::dict(py::arg("launches") = last_.launches, py::arg("bytes_read") = last_.bytes_read,
                  py::arg("bytes_written") = last_.bytes_written, py::arg("parameters") = last_.parameters,
                  py::arg("elements") = last_.elements);
}

i64 Plan::version(int index) const {
  const Entry& entry = entries_.at(static_cast<size_t>(index));
  return entry.ready && entry.arrays != nullptr && entry.arrays->watched ? entry.arrays->version : -1;
}

py::tuple Plan::squares(int threads) const {
  std::vector<Summed> gradients;
  for (const Entry& entry : entries_)
    if (entry.active) gradients.push_back({entry.work.streams[1], entry.work.elements});
  return squares_as_python(gradients, threads);
}

// Autograd may have saved the whole DTensor, or its local part.
void Plan::list_written(py::handle tensor) {
  written_.back().append(tensor);
  const py::object part = reader_.local(tensor);
  if (!part.is_none()) written_.back().append(part);
}

void Plan::increment_versions(const py::function& increment) const {
  for (size_t block = 0; block < written_.size(); ++block) {
    // The block after the next is fetched in three steps, each of which touches what the one before it fetched.
    const auto each = [&](size_t ahead, const auto& fetch) {
      if (block + ahead < written_.size())
        for (py::handle tensor : written_[block + ahead]) fetch(tensor);
    };
    each(3, [&](py::handle tensor) { ahead_.object(tensor); });
    each(2, [&](py::handle tensor) { ahead_.tensor(tensor); });
    each(1, [&](py::handle tensor) { ahead_.inside(tensor); });
    increment(written_[block]);
  }
  if (!zeroed_.empty()) increment(zeroed_);
  if (any_arrays_)
    for (const Entry& entry : entries_)
      if (entry.active && entry.arrays != nullptr && entry.arrays->watched)
        entry.arrays->version = reader_.version(entry.param);
}

Counter counter_of(const Reader& reader, py::handle tensor) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("the step count is not a plain tensor");
  const Counter counter{counter_type(now), address(now)};
  if (counter.type == Counter::kNone)
    throw std::invalid_argument("the step count must be one float or integer in CPU memory");
  return counter;
}

void step_once(const Reader& reader, const py::list& items, const py::array_t<double, py::array::c_style>& rows,
               int threads) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(items.size()))
    throw std::invalid_argument("one row of coefficients for each item is needed");
  std::vector<Work> works(items.size());
  std::vector<Kept> keeps(items.size());
  for (size_t i = 0; i < works.size(); ++i) {
    const auto item = items[i].cast<py::tuple>();
    const RuleKernels& rule = rule_at(item[0].cast<int>());
    const bool wide = item[1].cast<bool>(), plain = item[4].is_none();
    if (rows.shape(1) < 1 + rule.coefficients + (plain ? 0 : kTail))
      throw std::invalid_argument(std::string(rule.name) + " has more coefficients than a row");
    const auto tensors = item[2].cast<py::tuple>();
    const auto extras = plain ? py::tuple() : item[4].cast<py::tuple>()[1].cast<py::tuple>();
    if (plain) {
      if (static_cast<int>(tensors.size()) != 2 + rule.states)
        throw std::invalid_argument(std::string(rule.name) + " has " + std::to_string(rule.states) + " states");
    } else {
      const auto kept = item[4].cast<py::tuple>();
      const auto codecs = kept[0].cast<std::vector<int>>();
      describe(&keeps[i], rule, wide, codecs, kept[2].cast<bool>(), kept[4].cast<std::tuple<i64, i64, i64>>());
      keeps[i].key = kept[3].cast<u64>();
      if (tensors.size() != codecs.size() || extras.size() != codecs.size())
        throw std::invalid_argument("as many tensors, second arrays (or Nones) and codecs are needed");
    }
    dlpack::Tensor now;
    Layout layout;
    Kind param;
    for (int s = 0; s < static_cast<int>(tensors.size()); ++s) {
      if (!reader.read(tensors[static_cast<size_t>(s)], &now)) throw std::invalid_argument("not a plain tensor");
      if (s == 0) {
        layout = Layout(now);
        param = Kind(now);
      }
      if (plain ? !layout.dense() || !take(works[i], s, now, layout, param)
                : !walkable(keeps[i], layout) || !take_main(keeps[i], s, now, layout))
        throw std::invalid_argument("tensors must be p, g and the rule's states, dense, in CPU memory, of one order");
      if (plain) continue;
      const py::object extra = extras[static_cast<size_t>(s)];
      if (extra.is_none() != (extra_size(keeps[i].operands[s].codec) == 0) ||
          (!extra.is_none() && (!reader.read(extra, &now) || !take_extra(keeps[i], s, now, layout))))
        throw std::invalid_argument("operand " + std::to_string(s) + "'s second array is not that of its codec");
    }
    prepare(works[i], rule, wide, layout, param);
    if (!plain) {
      works[i].kept = &keeps[i];
      works[i].kept_kernel = wide ? kept_kernels().wide : kept_kernels().narrow;
    }
    if (!item[3].is_none()) works[i].counter = counter_of(reader, item[3]);
    works[i].row = static_cast<int>(i);
  }
  Division division;
  for (const Work& work : works) division.add(work);
  division.close();
  const py::gil_scoped_release release;
  division.walk(rows.data(), rows.shape(1), threads);
}

}  // namespace fasttrain
