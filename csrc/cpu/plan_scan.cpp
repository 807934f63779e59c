// What a plan does before every step: it compares what it was told with the Python objects.
#include "cpu/look.h"
#include "cpu/plan.h"
#include "cpu/take.h"

namespace fasttrain {
namespace {

constexpr size_t kDistance = 4;  // entries between two stages of fetching ahead

}  // namespace

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
    } else if (i >= entry.kept - entry.running) {
      if (!entry.numbers[i - (entry.kept - entry.running)].take(now)) return false;
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
    for (int i = 0; i < entry.running; ++i) Ahead::lines(entry.numbers[i].at, 1);
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
  Beside beside(state);
  size_t i = 0;
  for (const py::list& params : groups) {
    for (py::handle param : params) {
      fetch_ahead(i);
      Entry& e = entries_[i];
      if (param.ptr() != e.param.ptr()) return py::none();
      auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), name));
      if (!grad) throw py::error_already_set();
      PyObject* found = e.kept != 0 || e.arrays != nullptr ? beside.find(param) : nullptr;
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

}  // namespace fasttrain
