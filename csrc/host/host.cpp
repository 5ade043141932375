// effkern._host: host-side work on NumPy arrays and plain values, and the short way from Python to a kernel (direct.h).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "codes.h"
#include "direct.h"
#include "fingerprint.h"
#include "isa.h"
#include "kmeans.h"
#include "peak.h"

namespace py = pybind11;

namespace effkern::host {
namespace {

using F32 = py::array_t<float, py::array::c_style | py::array::forcecast>;
using I64 = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using U8 = py::array_t<uint8_t, py::array::c_style>;

constexpr int64_t kMaxEntries = int64_t{1} << 24;  // a block number is kept in a float, exact up to here
constexpr int64_t kMaxDim = int64_t{1} << 20;

std::string shape_text(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

void check_matrix(const F32& a, const char* name) {
  if (a.ndim() != 2) throw py::value_error(std::string(name) + ": must be 2-d, got shape " + shape_text(a));
  const float* data = a.data();
  for (py::ssize_t i = 0; i < a.size(); ++i)
    if (!std::isfinite(data[i]))
      throw py::value_error(std::string(name) + ": must be finite, got a NaN or an infinity");
}

// numpy would cast 1.7 to 1 without a word.
void check_integers(const py::array& a, const char* name) {
  const char kind = a.dtype().kind();
  if (kind != 'i' && kind != 'u') throw py::type_error(std::string(name) + ": must be integers");
}

void check_range(const I64& codes, int64_t limit, const char* name) {
  const int64_t* data = codes.data();
  for (py::ssize_t i = 0; i < codes.size(); ++i)
    if (data[i] < 0 || data[i] >= limit)
      throw py::value_error(std::string(name) + ": must lie in [0, " + std::to_string(limit) + "), got " +
                            std::to_string(data[i]));
}

void check_bits(int bits) {
  if (bits < 1 || bits > 32) throw py::value_error("bits: must be 1 to 32, got " + std::to_string(bits));
}

py::tuple py_assign(const F32& x, const F32& book, int threads) {
  check_matrix(x, "x");
  check_matrix(book, "book");
  const int64_t n = x.shape(0), k = book.shape(0), d = book.shape(1);
  if (x.shape(1) != d)
    throw py::value_error("book: must have as many columns as x (" + std::to_string(x.shape(1)) + "), got " +
                          std::to_string(d));
  if (k < 1 || k > kMaxEntries || d > kMaxDim)
    throw py::value_error("book: must have 1 to 2^24 rows, got shape " + shape_text(book));
  if (threads < 1) throw py::value_error("threads: must be at least 1, got " + std::to_string(threads));
  py::array_t<int64_t> codes(n);
  py::array_t<float> distance(n);
  const float *xp = x.data(), *bp = book.data();
  int64_t* cp = codes.mutable_data();
  float* dp = distance.mutable_data();
  {
    const py::gil_scoped_release nogil;
    assign(xp, bp, n, k, d, threads, cp, dp);
  }
  return py::make_tuple(std::move(codes), std::move(distance));
}

py::tuple py_update(const F32& x, const py::array& raw, int64_t k) {
  check_matrix(x, "x");
  check_integers(raw, "codes");
  const I64 codes(raw);
  if (codes.ndim() != 1 || codes.shape(0) != x.shape(0))
    throw py::value_error("codes: must be [" + std::to_string(x.shape(0)) + "], one per row of x, got " +
                          shape_text(codes));
  if (k < 1 || k > kMaxEntries) throw py::value_error("k: must be 1 to 2^24, got " + std::to_string(k));
  check_range(codes, k, "codes");
  const int64_t n = x.shape(0), d = x.shape(1);
  py::array_t<float> mean({k, d});
  py::array_t<int64_t> counts(k);
  const float* xp = x.data();
  const int64_t* cp = codes.data();
  float* mp = mean.mutable_data();
  int64_t* np = counts.mutable_data();
  {
    const py::gil_scoped_release nogil;
    update(xp, cp, n, k, d, mp, np);
  }
  return py::make_tuple(std::move(mean), std::move(counts));
}

py::array_t<uint8_t> py_pack(const py::array& raw, int bits) {
  check_bits(bits);
  check_integers(raw, "codes");
  const I64 codes(raw);
  check_range(codes, int64_t{1} << bits, "codes");
  py::array_t<uint8_t> bytes(packed_bytes(codes.size(), bits));
  const int64_t* cp = codes.data();
  uint8_t* bp = bytes.mutable_data();
  const int64_t count = codes.size();
  {
    const py::gil_scoped_release nogil;
    pack(cp, count, bits, bp);
  }
  return bytes;
}

py::array_t<int64_t> py_unpack(const U8& bytes, int bits, int64_t count) {
  check_bits(bits);
  if (count < 0 || count > (int64_t{1} << 40))
    throw py::value_error("count: must not be negative, got " + std::to_string(count));
  if (bytes.ndim() != 1 || bytes.size() != packed_bytes(count, bits))
    throw py::value_error("packed: must be " + std::to_string(packed_bytes(count, bits)) + " bytes for " +
                          std::to_string(count) + " codes of " + std::to_string(bits) + " bits, got shape " +
                          shape_text(bytes));
  py::array_t<int64_t> codes(count);
  const uint8_t* bp = bytes.data();
  int64_t* cp = codes.mutable_data();
  {
    const py::gil_scoped_release nogil;
    unpack(bp, count, bits, cp);
  }
  return codes;
}

double py_fma_peak(double seconds, const std::optional<std::string>& name) {
  if (!(seconds > 0 && seconds <= 60))
    throw py::value_error("seconds: must be above 0 and at most 60, got " + std::to_string(seconds));
  const std::string chosen = name.value_or(isa());
  bool known = false;
  for (const std::string& candidate : available_isas()) known |= candidate == chosen;
  if (!known) throw py::value_error("isa: '" + chosen + "' is unknown or not available on this processor");
  const py::gil_scoped_release nogil;
  return fma_peak(seconds, chosen);
}

}  // namespace
}  // namespace effkern::host

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  using namespace effkern::host;
  m.doc() = "Work on arrays: k-means steps, packing of codes, instruction-set switch, peak timer, fingerprints.";
  m.def("assign", &py_assign, py::arg("x"), py::arg("book"), py::arg("threads") = 1,
        "Nearest row of book [k, d] for every row of x [n, d]: (codes int64 [n], squared distances float32 [n]).\n\n"
        "The lowest row among equally near ones. The result does not depend on threads.");
  m.def("update", &py_update, py::arg("x"), py::arg("codes"), py::arg("k"),
        "Means of the rows of x [n, d] with each code: (means float32 [k, d], counts int64 [k]).\n\n"
        "Sums are kept in float64; the mean of an empty cluster is 0.");
  m.def("pack_codes", &py_pack, py::arg("codes"), py::arg("bits"),
        "Codes of any shape as bytes, `bits` (1 to 32) each, least significant first, without gaps.");
  m.def("unpack_codes", &py_unpack, py::arg("packed"), py::arg("bits"), py::arg("count"),
        "The `count` codes behind pack_codes, int64 [count].");
  m.def("isa", &isa, "Instruction set the kernels of effkern._C run with.");
  m.def("available_isas", &available_isas, "Instruction sets this processor and operating system support.");
  m.def("set_isa", &set_isa, py::arg("name"), "Make the kernels of effkern._C run with scalar, avx2 or avx512.");
  m.def("fma_peak", &py_fma_peak, py::arg("seconds") = 0.05, py::arg("isa") = py::none(),
        "GFLOP/s of this thread on nothing but float32 multiply-adds, right now.");
  bind_fingerprint(m);
  bind_direct(m);
}
