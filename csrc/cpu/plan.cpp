#include "cpu/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/reduce_bind.h"

namespace fasttrain {
namespace {

constexpr size_t kDistance = 4;  // entries between two stages of fetching ahead
constexpr size_t kBlock = 16;    // parameters whose versions are incremented together

char* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

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

const RuleKernels& rule_at(int rule) {
  const IsaKernels& kernels = chosen_kernels();
  if (rule < 0 || rule >= kernels.count) throw std::out_of_range("no rule " + std::to_string(rule));
  return kernels.rules[rule];
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
  work.kernel = wide ? rule.wide : rule.narrow;
  work.elements = layout.elements() * (param.complex() ? 2 : 1);  // a complex number is two reals
}

}  // namespace

Reader::Reader(const py::capsule& exchange, py::tuple types) : types_(std::move(types)) {
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
  return false;
}

bool Reader::read_gradient(py::handle tensor, dlpack::Tensor* out) const {
  if (!read(tensor, out)) return false;
  PyObject* arguments[] = {tensor.ptr()};
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
  if (!reader_.read_gradient(grad, &now) || !entry.kinds[1].matches(now) || !alike(param, now)) return false;
  placed_ &= work.streams[0].at == address(param);
  work.streams[0].at = address(param);
  work.streams[1].at = address(now);
  if (entry.kept == 0) return true;
  if (state.ptr() != entry.state.ptr()) return false;
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

// Three stages, each for an entry nearer to its turn: what the entry points to, then what that points to.
void Plan::fetch_ahead(size_t index) const {
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
      if (e.kept != 0 && more && next == param.ptr()) {
        found = next_state;
        more = PyDict_Next(state.ptr(), &position, &next, &next_state) != 0;
      } else if (e.kept != 0) {
        found = look_up(state, param);
      }
      const bool active = !grad.is_none() && patch(e, grad, found);
      if (!grad.is_none() && !active) attention.append(i);
      if (e.active != active) divided_ = false;
      e.active = active;
      if (active) {
        e.last_grad = ahead_.place(grad);
        grads_.push_back(std::move(grad));
      }
      ++i;
    }
  }
  return attention;
}

void Plan::release() { grads_.clear(); }

bool Plan::set(int index, int rule, bool wide, py::dict state, const py::tuple& keys, bool counted, bool fresh) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  const RuleKernels& kernels = rule_at(rule);
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
  if (!reader_.read_gradient(grad, &now) || !take(entry.work, 1, now, entry.layout, param)) return false;
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

std::vector<std::pair<int, double>> Plan::rows() {
  rows_.clear();
  std::vector<int> last(group_sizes_.size(), -1);  // the row of the group's previous parameter, most often the right one
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    const double step = entry.work.counter.type != Counter::kNone ? entry.work.counter.read() + 1 : entry.fresh ? 1 : 2;
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
  i64 listed = 0;
  for (const Entry& entry : entries_) {
    if (!entry.active) continue;
    division_.add(entry.work);
    widest_ = std::max(widest_, entry.work.rule->coefficients);
    if (listed++ % kBlock == 0) written_.emplace_back();
    written_.back().append(entry.param);
    for (int i = 0; i < entry.kept; ++i) written_.back().append(entry.tensors[i]);
  }
  division_.close();
  divided_ = true;
}

void Plan::run(const py::array_t<double, py::array::c_style>& rows, int threads, const py::function& increment) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(rows_.size()))
    throw std::invalid_argument("one row of coefficients for each of rows() is needed");
  if (!divided_) arrange();
  if (rows.shape(1) < 1 + widest_) throw std::invalid_argument("a rule has more coefficients than a row");
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
}

py::tuple Plan::squares(int threads) const {
  std::vector<Summed> gradients;
  for (const Entry& entry : entries_)
    if (entry.active) gradients.push_back({entry.work.streams[1], entry.work.elements});
  return squares_as_python(gradients, threads);
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
  for (size_t i = 0; i < works.size(); ++i) {
    const auto item = items[i].cast<py::tuple>();
    const RuleKernels& rule = rule_at(item[0].cast<int>());
    if (rows.shape(1) < 1 + rule.coefficients)
      throw std::invalid_argument(std::string(rule.name) + " has more coefficients than a row");
    const auto tensors = item[2].cast<py::tuple>();
    if (static_cast<int>(tensors.size()) != 2 + rule.states)
      throw std::invalid_argument(std::string(rule.name) + " has " + std::to_string(rule.states) + " states");
    dlpack::Tensor now;
    Layout layout;
    Kind param;
    for (int s = 0; s < 2 + rule.states; ++s) {
      if (!reader.read(tensors[static_cast<size_t>(s)], &now)) throw std::invalid_argument("not a plain tensor");
      if (s == 0) {
        layout = Layout(now);
        param = Kind(now);
      }
      if (!layout.dense() || !take(works[i], s, now, layout, param))
        throw std::invalid_argument("tensors must be p, g and the rule's states, dense, in CPU memory, of one order");
    }
    prepare(works[i], rule, item[1].cast<bool>(), layout, param);
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
