#include "cpu/roster.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "cpu/look.h"
#include "cpu/take.h"

namespace fasttrain {
namespace {

constexpr size_t kDistance = 4;  // entries between two stages of fetching ahead

}  // namespace

Roster::Roster(Reader reader, const std::vector<py::list>& groups)
    : reader_(std::move(reader)), ahead_(reader_.ahead()) {
  for (size_t group = 0; group < groups.size(); ++group) {
    group_sizes_.push_back(groups[group].size());
    for (py::handle param : groups[group]) {
      Entry entry;
      entry.param = py::reinterpret_borrow<py::object>(param);
      entry.group = static_cast<int>(group);
      entries_.push_back(std::move(entry));
    }
  }
  active_.resize(entries_.size());
  grads_.resize(entries_.size());
}

// A gradient that the kernels can read as it lies; of complex numbers, one that is not to be conjugated.
bool Roster::gradient(Entry& entry, py::handle grad, dlpack::Tensor* now) const {
  if (!reader_.placed(grad, entry.param, &entry.placed)) return false;
  const py::object part = reader_.part(grad);
  if (!reader_.read_part(part, now) || reader_.negated(part)) return false;
  return !Kind(*now).complex() || !py::cast<bool>(part.attr("is_conj")());
}

// Keeps the part, so that what it points to can be fetched ahead next time.
bool Roster::read(py::handle tensor, py::object* part, dlpack::Tensor* now) const {
  *part = reader_.part(tensor);
  return reader_.read_part(*part, now);
}

bool Roster::same(Entry& entry, py::handle grad, py::handle state) const {
  if (!entry.ready) return false;
  dlpack::Tensor param, now;
  if (!read(entry.param, &entry.part, &param) || !entry.param_kind.matches(param) || !entry.layout.matches(param) ||
      entry.at != address(param))
    return false;
  if (!gradient(entry, grad, &now) || !entry.grad_kind.matches(now) ||
      !(entry.grad_like ? alike(param, now) : entry.grad_layout.matches(now)))
    return false;
  entry.grad = address(now);
  if (!entry.held.empty() && state.ptr() != entry.state.ptr()) return false;
  for (Held& held : entry.held) {
    PyObject* tensor = look_up(entry.state, held.key);
    if (tensor != held.tensor.ptr() || !read(tensor, &held.part, &now) || !held.kind.matches(now) ||
        held.at != address(now) || !(held.like ? alike(param, now) : held.layout.matches(now)))
      return false;
  }
  return !entry.watched || reader_.version(entry.param) == entry.version;
}

// Three stages, each for an entry nearer to its turn: what the entry points to, then what that points to.
void Roster::fetch_ahead(size_t index) const {
  const auto each = [&](size_t distance, const auto& fetch) {
    if (index + distance < entries_.size()) fetch(entries_[index + distance]);
  };
  each(4 * kDistance, [&](const Entry& entry) {
    Ahead::lines(reinterpret_cast<const char*>(entry.held.data()), static_cast<int>(2 * entry.held.size()));
  });
  each(3 * kDistance, [&](const Entry& entry) {
    if (!entry.ready) return;
    ahead_.object(entry.param);
    if (!entry.part.is(entry.param)) ahead_.object(entry.part);
    if (!entry.held.empty()) ahead_.object(entry.state);
    for (const Held& held : entry.held) {
      ahead_.object(held.tensor);
      if (!held.part.is(held.tensor)) ahead_.object(held.part);
    }
  });
  each(2 * kDistance, [&](const Entry& entry) {
    if (!entry.ready) return;
    entry.layout.fetch();
    ahead_.tensor(entry.part);
    if (!entry.held.empty()) ahead_.dict(entry.state);
    for (const Held& held : entry.held) ahead_.tensor(held.part);
  });
  each(kDistance, [&](const Entry& entry) {
    if (!entry.ready) return;
    ahead_.inside(entry.part);
    for (const Held& held : entry.held) ahead_.inside(held.part);
  });
}

void Roster::take(size_t index, bool active, py::object grad) {
  listed_ &= active_[index] == (active ? 1 : 0);
  active_[index] = active ? 1 : 0;
  grads_[index] = active ? std::move(grad) : py::object();
}

py::object Roster::gradient_of(size_t index) const {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(entries_[index].param.ptr(), name));
  if (!grad) throw py::error_already_set();
  return grad;
}

// Gradients that are new lie where nobody knows: they are taken ahead, and what they point to is fetched.
void Roster::fetch_gradients_ahead(size_t index) {
  const auto at = [&](size_t distance) -> PyObject* {
    if (index + distance >= entries_.size()) return nullptr;
    const py::object& grad = grads_[index + distance];
    return grad && !grad.is_none() ? grad.ptr() : nullptr;
  };
  if (index + kDistance < entries_.size()) grads_[index + kDistance] = gradient_of(index + kDistance);
  if (PyObject* grad = at(kDistance)) ahead_.object(grad);
  if (PyObject* grad = at(kDistance - 1)) ahead_.tensor(grad);
  if (PyObject* grad = at(kDistance - 2)) ahead_.inside(grad);
}

py::object Roster::scan(py::dict state, const std::vector<py::list>& groups) {
  release();
  if (groups.size() != group_sizes_.size()) return py::none();
  for (size_t group = 0; group < groups.size(); ++group)
    if (groups[group].size() != group_sizes_[group]) return py::none();
  py::list attention;
  Beside beside(state);
  size_t i = 0;
  for (; i < std::min(kDistance, entries_.size()); ++i) grads_[i] = gradient_of(i);
  i = 0;
  for (const py::list& params : groups) {
    for (py::handle param : params) {
      fetch_ahead(i);
      fetch_gradients_ahead(i);
      Entry& entry = entries_[i];
      if (param.ptr() != entry.param.ptr()) {
        release();
        return py::none();
      }
      py::object grad = std::move(grads_[i]);
      PyObject* found = entry.held.empty() ? nullptr : beside.find(param);
      const bool active = !grad.is_none() && same(entry, grad, found);
      if (!grad.is_none() && !active) attention.append(i);
      take(i, active, std::move(grad));
      ++i;
    }
  }
  return attention;
}

bool Roster::again(int index, py::dict state) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  const py::object grad = entry.param.attr("grad");
  const bool active = !grad.is_none() && same(entry, grad, look_up(state, entry.param));
  take(static_cast<size_t>(index), active, grad);
  return active;
}

bool Roster::set(int index, const py::dict& state, const py::tuple& keys, bool counted, bool fresh, bool zero,
                 bool watched) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  entry.ready = listed_ = false;
  entry.version = -1;
  entry.held.clear();
  entry.counter = Counter();
  take(static_cast<size_t>(index), false, py::none());
  dlpack::Tensor param, now;
  if (!read(entry.param, &entry.part, &param)) return false;
  entry.param_kind = Kind(param);
  entry.layout = Layout(param);
  entry.at = address(param);
  const py::object grad = entry.param.attr("grad");
  if (grad.is_none() || !gradient(entry, grad, &now)) return false;
  entry.grad_kind = Kind(now);
  entry.grad_layout = Layout(now);
  entry.grad_like = alike(param, now);
  entry.grad = address(now);
  entry.state = state;
  for (py::handle key : keys) {
    Held held;
    held.key = py::reinterpret_borrow<py::object>(key);
    held.tensor = state[key];
    if (!read(held.tensor, &held.part, &now)) return false;
    held.kind = Kind(now);
    held.layout = Layout(now);
    held.like = alike(param, now);
    held.at = address(now);
    entry.held.push_back(std::move(held));
  }
  if (counted) {
    if (entry.held.empty()) throw std::invalid_argument("a counted parameter needs the key of its step count");
    entry.counter = {counter_type(now), address(now)};
    if (entry.counter.type == Counter::kNone || now.ndim != 0) return false;
  }
  entry.fresh = fresh;
  entry.zero = zero;
  entry.watched = watched;
  entry.version = watched ? reader_.version(entry.param) : -1;
  entry.ready = true;
  take(static_cast<size_t>(index), true, grad);
  return true;
}

py::bytes Roster::active() const { return {reinterpret_cast<const char*>(active_.data()), active_.size()}; }

py::array_t<i64> Roster::addresses() const {
  py::array_t<i64> made(std::count(active_.begin(), active_.end(), u8{1}));
  i64* to = made.mutable_data();
  for (size_t i = 0; i < entries_.size(); ++i)
    if (active_[i] != 0) *to++ = reinterpret_cast<i64>(entries_[i].grad);
  return made;
}

std::pair<std::vector<std::tuple<int, double>>, py::array_t<i64>> Roster::rows() const {
  std::vector<std::tuple<int, double>> found;
  std::map<std::pair<int, u64>, i64> known;
  py::array_t<i64> row_of(std::count(active_.begin(), active_.end(), u8{1}));
  i64* to = row_of.mutable_data();
  std::pair<int, u64> previous{-1, 0};  // of the parameter before, most often the right one
  i64 row = -1;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (active_[i] == 0) continue;
    if (i + 2 * kDistance < entries_.size() && entries_[i + 2 * kDistance].counter.at != nullptr)
      Ahead::lines(entries_[i + 2 * kDistance].counter.at, 1);
    const Entry& entry = entries_[i];
    const double step = entry.counter.type != Counter::kNone ? entry.counter.read() + 1 : entry.fresh ? 1 : 2;
    std::pair<int, u64> key{entry.group, 0};
    std::memcpy(&key.second, &step, sizeof step);
    if (key != previous) {
      const auto [at, fresh] = known.emplace(key, static_cast<i64>(found.size()));
      if (fresh) found.emplace_back(entry.group, step);
      row = at->second;
      previous = key;
    }
    *to++ = row;
  }
  return {found, row_of};
}

void Roster::list_written() {
  written_.clear();
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (active_[i] == 0) continue;
    written_.next();
    written_.add(entries_[i].param, reader_);
    for (const Held& held : entries_[i].held) written_.add(held.tensor, reader_);
  }
  listed_ = true;
}

void Roster::stepped(const py::function& increment) {
  if (!listed_) list_written();
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (active_[i] == 0) continue;
    Entry& entry = entries_[i];
    if (i + 2 * kDistance < entries_.size() && entries_[i + 2 * kDistance].counter.at != nullptr)
      Ahead::lines(entries_[i + 2 * kDistance].counter.at, 1);
    if (entry.counter.type != Counter::kNone) entry.counter.increment();
    entry.fresh = false;
  }
  written_.increment(ahead_, increment);
  py::list zeroed;
  for (size_t i = 0; i < entries_.size(); ++i)
    if (active_[i] != 0 && entries_[i].zero) zeroed.append(entries_[i].param.attr("grad"));
  if (!zeroed.empty()) increment(zeroed);
}

void Roster::remember() {
  for (size_t i = 0; i < entries_.size(); ++i)
    if (active_[i] != 0 && entries_[i].watched) entries_[i].version = reader_.version(entries_[i].param);
}

i64 Roster::version(int index) const { return entries_.at(static_cast<size_t>(index)).version; }

void Roster::release() {
  for (py::object& grad : grads_) grad = py::object();
}

}  // namespace fasttrain
