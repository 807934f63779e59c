#include "cpu/pack_bind.h"

#include <pybind11/stl.h>

#include "cpu/pack.h"
#include "cpu/take.h"

namespace fasttrain {
namespace {

constexpr i64 kBrief = 1 << 14;  // elements below which others may wait for the interpreter meanwhile

struct Flat {
  Operand operand{};
  i64 elements = 0;
};

// A contiguous real tensor in CPU memory; of int8 if `codes`.
Flat flat_of(const Reader& reader, py::handle tensor, bool codes = false) {
  dlpack::Tensor now;
  if (!reader.read(tensor, &now)) throw std::invalid_argument("not a plain tensor");
  const Layout layout(now);
  const Kind kind(now);
  const int codec = !codes ? kind.storage()
                    : now.dtype.code == dlpack::kInt && now.dtype.bits == 8 && now.dtype.lanes == 1 ? kInt8 : -1;
  if (codec < 0 || kind.complex() || kind.device.type != dlpack::kCPU || !layout.contiguous())
    throw std::invalid_argument("a tensor must be contiguous, in CPU memory and of a dtype that is taken");
  return {{address(now), nullptr, static_cast<u8>(codec)}, layout.elements()};
}

// The same with the units of its blocks, if they are not None.
Flat chunk_of(const Reader& reader, py::handle main, py::handle units) {
  Flat chunk = flat_of(reader, main, !units.is_none());
  if (units.is_none()) return chunk;
  const Flat extra = flat_of(reader, units);
  if (extra.operand.codec != kF32 || extra.elements != extra_elements(kInt8, chunk.elements))
    throw std::invalid_argument("one fp32 unit for each 256 codes is needed");
  chunk.operand.extra = extra.operand.main;
  return chunk;
}

i64 bytes_of(const Operand& o, i64 elements) { return main_bytes(o.codec, elements) + extra_bytes(o.codec, elements); }

// Where tensors lie in a flat bucket: checked once, so that moving one of them costs little.
class Bucket {
 public:
  // `views`: of the bucket, one for each slot, of the strides in which a tensor must come. `residual` is None or has the
  // bucket's length.
  Bucket(Reader reader, py::object bucket, const py::list& views, const std::vector<i64>& offsets, py::object residual)
      : reader_(std::move(reader)), bucket_(std::move(bucket)), residual_(std::move(residual)) {
    flat_ = flat_of(reader_, bucket_);
    if (!residual_.is_none()) {
      const Flat lost = flat_of(reader_, residual_);
      if (lost.elements != flat_.elements) throw std::invalid_argument("the residual must be as long as the bucket");
      lost_ = lost.operand;
    }
    if (views.size() != offsets.size()) throw std::invalid_argument("one offset for each view is needed");
    for (size_t i = 0; i < offsets.size(); ++i) {
      dlpack::Tensor now;
      if (!reader_.read(views[i], &now)) throw std::invalid_argument("not a plain tensor");
      Slot slot{views[i], offsets[i], Layout(now), 0};
      slot.elements = slot.layout.elements();
      if (!slot.layout.dense() || slot.offset < 0 || slot.elements > flat_.elements - slot.offset)
        throw std::invalid_argument("a slot must be dense and inside of the bucket");
      slots_.push_back(std::move(slot));
    }
  }

  // Packs one tensor. False, and nothing is written, if it is not as its slot wants it.
  bool pack(i64 index, py::handle tensor, double scale, int threads) {
    one_.resize(1);
    if (!prepare(&one_[0], index, tensor, scale, true)) return false;
    run(one_, threads);
    return true;
  }

  // The indices of the tensors that are not as their slots want them; if there are any, nothing is written.
  std::vector<i64> move_all_of(const py::list& tensors, double scale, int threads, bool in) {
    if (tensors.size() != slots_.size()) throw std::invalid_argument("one tensor for each slot is needed");
    std::vector<i64> left;
    std::vector<Move> moves(slots_.size());
    for (size_t i = 0; i < slots_.size(); ++i)
      if (!prepare(&moves[i], static_cast<i64>(i), tensors[i], scale, in)) left.push_back(static_cast<i64>(i));
    if (left.empty()) run(moves, threads);
    return left;
  }
  std::vector<i64> pack_all(const py::list& tensors, double scale, int threads) {
    return move_all_of(tensors, scale, threads, true);
  }
  std::vector<i64> unpack_all(const py::list& tensors, double scale, int threads) {
    return move_all_of(tensors, scale, threads, false);
  }

  // (launches, elements, bytes read, bytes written) since the bucket was made.
  py::tuple moved() const { return py::make_tuple(launches_, elements_, read_, written_); }

 private:
  struct Slot {
    py::object view;
    i64 offset;
    Layout layout;
    i64 elements;
  };

  bool prepare(Move* to, i64 index, py::handle tensor, double scale, bool in) const {
    if (index < 0 || index >= static_cast<i64>(slots_.size())) return false;
    const Slot& slot = slots_[static_cast<size_t>(index)];
    dlpack::Tensor now;
    if (!reader_.read_gradient(tensor, slot.view, &now)) return false;
    const Kind kind(now);
    const int storage = kind.storage();
    if (storage < 0 || kind.complex() || kind.device.type != dlpack::kCPU || !slot.layout.matches(now)) return false;
    const i64 size = storage_bytes(flat_.operand.codec);
    const Operand own{flat_.operand.main + slot.offset * size, nullptr, flat_.operand.codec};
    const Operand given{address(now), nullptr, static_cast<u8>(storage)};
    // Beside the bucket, or the slot itself: nothing in between.
    const char *begin = flat_.operand.main, *end = begin + flat_.elements * size;
    const bool apart = given.main + slot.elements * storage_bytes(given.codec) <= begin || given.main >= end;
    if (!apart && slot.elements != 0 && !(given.main == own.main && given.codec == own.codec)) return false;
    to->from = in ? given : own;
    to->to = in ? own : given;
    to->feedback = in && lost_.main != nullptr;
    if (to->feedback) to->lost = {lost_.main + slot.offset * storage_bytes(lost_.codec), nullptr, lost_.codec};
    to->elements = slot.elements;
    to->scale = scale;
    to->wide = given.codec == kF64 || own.codec == kF64;
    return true;
  }

  void run(const std::vector<Move>& moves, int threads) {
    i64 elements = 0;
    for (const Move& m : moves) {
      elements += m.elements;
      const i64 lost = m.feedback ? bytes_of(m.lost, m.elements) : 0;
      read_ += bytes_of(m.from, m.elements) + lost;
      written_ += bytes_of(m.to, m.elements) + lost;
    }
    ++launches_;
    elements_ += elements;
    if (elements <= kBrief) return move_all(moves, 1);
    const std::vector<Move> own = moves;  // of this call: another thread may pack meanwhile
    const py::gil_scoped_release release;
    move_all(own, threads);
  }

  Reader reader_;
  py::object bucket_, residual_;  // kept alive
  Flat flat_;
  Operand lost_{};
  std::vector<Slot> slots_;
  std::vector<Move> one_;
  i64 launches_ = 0, elements_ = 0, read_ = 0, written_ = 0;
};

// `chunks` are tensors of one dtype or int8 codes, `units` a list as long or None. (sum of squares, whether any element
// is infinite or NaN) of what is stored, if they are asked for, else None.
py::object sum_of_chunks(const Reader& reader, const py::list& chunks, const py::object& units, py::handle out,
                         double scale, bool squares, int threads) {
  if (chunks.empty()) throw std::invalid_argument("there is no chunk");
  const Flat to = flat_of(reader, out);
  Sum sum{{}, to.operand, to.elements, scale, to.operand.codec == kF64};
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Flat chunk = chunk_of(reader, chunks[i], units.is_none() ? py::none() : units[py::int_(i)].cast<py::object>());
    if (chunk.elements != to.elements || (i != 0 && chunk.operand.codec != sum.chunks[0].codec))
      throw std::invalid_argument("chunks must be as long as the result, and of one dtype");
    sum.chunks.push_back(chunk.operand);
    sum.wide |= chunk.operand.codec == kF64;
  }
  if (sum.wide && !units.is_none()) throw std::invalid_argument("codes are added in fp32");
  double total = 0.0;
  bool nonfinite = false;
  {
    const py::gil_scoped_release release;
    nonfinite = sum_chunks(sum, squares ? &total : nullptr, threads);
  }
  return squares ? py::object(py::make_tuple(total, nonfinite)) : py::none();
}

// codes, units = encode(bucket * scale + residual), and what that lost into the residual, if it is not None.
void encode_chunk(const Reader& reader, py::handle bucket, py::handle codes, py::handle units, double scale,
                  py::handle residual, int threads) {
  const Flat from = flat_of(reader, bucket), to = chunk_of(reader, codes, units);
  Move move{from.operand, to.operand, {}, from.elements, scale, !residual.is_none(), false};
  if (move.feedback) {
    const Flat lost = flat_of(reader, residual);
    if (lost.elements != from.elements) throw std::invalid_argument("the residual must be as long as the bucket");
    move.lost = lost.operand;
  }
  if (to.elements != from.elements || units.is_none() || from.operand.codec == kF64 ||
      (move.feedback && move.lost.codec == kF64))
    throw std::invalid_argument("codes are of as many numbers, computed in fp32");
  const py::gil_scoped_release release;
  move_all({move}, threads);
}

}  // namespace

void bind_pack(py::module_& m) {
  py::class_<Bucket>(m, "Bucket")
      .def(py::init<Reader, py::object, const py::list&, const std::vector<i64>&, py::object>())
      .def("pack", &Bucket::pack)
      .def("pack_all", &Bucket::pack_all)
      .def("unpack_all", &Bucket::unpack_all)
      .def_property_readonly("moved", &Bucket::moved);
  m.def("sum_chunks", &sum_of_chunks, "Add chunks in the order in which they are given.");
  m.def("encode_chunk", &encode_chunk, "Write numbers as 8-bit codes in blocks.");
}

}  // namespace fasttrain
