// The extension module: takes addresses, releases the GIL, calls. Validation is the ops' business.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "fastnorm/isa.hpp"
#include "fastnorm/parallel.hpp"
#include "fastnorm/plan.hpp"

namespace py = pybind11;

void register_copies(py::module_& m);   // copies.cpp
void register_memory(py::module_& m);   // memory.cpp
void register_plain(py::module_& m);    // plain.cpp
void register_vectors(py::module_& m);  // vectors.cpp

namespace {

using fastnorm::ChannelShape;
using fastnorm::DType;
using fastnorm::GroupShape;
using fastnorm::Kernels;
using fastnorm::RowShape;
using std::size_t;

// Those of the array's dtype, by its character, which ml_dtypes' bfloat16 has too ('E') where it has no buffer
// protocol.
const Kernels& kernels_of(const py::array& array) {
  switch (array.dtype().char_()) {
    case 'e':
      return fastnorm::kernels(DType::float16);
    case 'E':
      return fastnorm::kernels(DType::bfloat16);
    case 'f':
      return fastnorm::kernels(DType::float32);
    case 'd':
      return fastnorm::kernels(DType::float64);
    default:
      throw std::invalid_argument("kernels take float16, bfloat16, float32 and float64");
  }
}

using Array = const py::array&;
using Optional = const py::object&;

const double* reals(Array array) { return static_cast<const double*>(array.data()); }
double* reals_out(py::array& array) { return static_cast<double*>(array.mutable_data()); }

const void* optional(Optional object) {
  return object.is_none() ? nullptr : py::reinterpret_borrow<py::array>(object).data();
}
double* optional_out(Optional object) {
  if (object.is_none()) return nullptr;
  auto array = py::reinterpret_borrow<py::array>(object);
  return reals_out(array);
}

void register_channel(py::module_& m) {
  m.def("channel_moments", [](Array x, size_t outer, size_t channels, size_t inner, py::array mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void* from = x.data();
    double *to_mean = reals_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.channel_moments(from, ChannelShape{outer, channels, inner}, to_mean, to_var);
  });
  m.def("channel_weighted_moments", [](Array x, size_t outer, size_t channels, size_t inner, Array weights, bool each,
                                       py::array count, py::array mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void *from = x.data(), *weigh = weights.data();
    double *to_count = reals_out(count), *to_mean = reals_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.channel_weighted_moments(from, ChannelShape{outer, channels, inner}, weigh, each, to_count, to_mean, to_var);
  });
  m.def("channel_apply", [](Array x, size_t outer, size_t channels, size_t inner, Array mean, Array var, double eps,
                            Optional gamma, Optional beta, py::array y) {
    const Kernels& k = kernels_of(x);
    const void *from = x.data(), *scale = optional(gamma), *shift = optional(beta);
    const double *centre = reals(mean), *spread = reals(var);
    void* to = y.mutable_data();
    const py::gil_scoped_release release;
    k.channel_apply(from, ChannelShape{outer, channels, inner}, centre, spread, eps, scale, shift, to);
  });
  m.def("channel_forward", [](Array x, size_t outer, size_t channels, size_t inner, Optional gamma, Optional beta,
                              double eps, py::array y, py::array mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void *from = x.data(), *scale = optional(gamma), *shift = optional(beta);
    void* to = y.mutable_data();
    double *to_mean = reals_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.channel_forward(from, ChannelShape{outer, channels, inner}, scale, shift, eps, to, to_mean, to_var);
  });
  m.def("channel_backward_reduce", [](Array dy, Array x, size_t outer, size_t channels, size_t inner, Array mean,
                                      Array var, double eps, py::array sum_dy, py::array sum_dy_xhat) {
    const Kernels& k = kernels_of(x);
    const void *grad = dy.data(), *from = x.data();
    const double *centre = reals(mean), *spread = reals(var);
    double *to_dy = reals_out(sum_dy), *to_dy_xhat = reals_out(sum_dy_xhat);
    const py::gil_scoped_release release;
    k.channel_backward_reduce(grad, from, ChannelShape{outer, channels, inner}, centre, spread, eps, to_dy, to_dy_xhat);
  });
  m.def("channel_backward_apply",
        [](Array dy, Array x, size_t outer, size_t channels, size_t inner, Array mean, Array var, double eps,
           Optional gamma, Array sum_dy, Array sum_dy_xhat, double count, py::array dx) {
          const Kernels& k = kernels_of(x);
          const void *grad = dy.data(), *from = x.data(), *scale = optional(gamma);
          const double *centre = reals(mean), *spread = reals(var), *dy_sum = reals(sum_dy),
                       *dy_xhat_sum = reals(sum_dy_xhat);
          void* to = dx.mutable_data();
          const py::gil_scoped_release release;
          k.channel_backward_apply(grad, from, ChannelShape{outer, channels, inner}, centre, spread, eps, scale, dy_sum,
                                   dy_xhat_sum, count, to);
        });
  m.def("channel_backward", [](Array dy, Array x, size_t outer, size_t channels, size_t inner, Array mean, Array var,
                               double eps, Optional gamma, py::array dx, py::array sum_dy, py::array sum_dy_xhat) {
    const Kernels& k = kernels_of(x);
    const void *grad = dy.data(), *from = x.data(), *scale = optional(gamma);
    const double *centre = reals(mean), *spread = reals(var);
    void* to = dx.mutable_data();
    double *to_dy = reals_out(sum_dy), *to_dy_xhat = reals_out(sum_dy_xhat);
    const py::gil_scoped_release release;
    k.channel_backward(grad, from, ChannelShape{outer, channels, inner}, centre, spread, eps, scale, to, to_dy,
                       to_dy_xhat);
  });
}

void register_group(py::module_& m) {
  m.def("group_moments", [](Array x, size_t samples, size_t outer, size_t channels, size_t inner, size_t groups,
                            py::array mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void* from = x.data();
    double *to_mean = reals_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.group_moments(from, GroupShape{samples, outer, channels, inner, groups}, to_mean, to_var);
  });
  m.def("group_forward", [](Array x, size_t samples, size_t outer, size_t channels, size_t inner, size_t groups,
                            Optional gamma, Optional beta, double eps, py::array y, py::array mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void *from = x.data(), *scale = optional(gamma), *shift = optional(beta);
    void* to = y.mutable_data();
    double *to_mean = reals_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.group_forward(from, GroupShape{samples, outer, channels, inner, groups}, scale, shift, eps, to, to_mean, to_var);
  });
  m.def("group_backward",
        [](Array dy, Array x, size_t samples, size_t outer, size_t channels, size_t inner, size_t groups, Array mean,
           Array var, double eps, Optional gamma, py::array dx, py::array sum_dy, py::array sum_dy_xhat) {
          const Kernels& k = kernels_of(x);
          const void *grad = dy.data(), *from = x.data(), *scale = optional(gamma);
          const double *centre = reals(mean), *spread = reals(var);
          void* to = dx.mutable_data();
          double *to_dy = reals_out(sum_dy), *to_dy_xhat = reals_out(sum_dy_xhat);
          const py::gil_scoped_release release;
          k.group_backward(grad, from, GroupShape{samples, outer, channels, inner, groups}, centre, spread, eps, scale,
                           to, to_dy, to_dy_xhat);
        });
}

void register_row(py::module_& m) {
  m.def("row_forward", [](Array x, size_t rows, size_t cols, Optional gamma, Optional beta, double eps, py::array y,
                          Optional mean, py::array var) {
    const Kernels& k = kernels_of(x);
    const void *from = x.data(), *scale = optional(gamma), *shift = optional(beta);
    void* to = y.mutable_data();
    double *to_mean = optional_out(mean), *to_var = reals_out(var);
    const py::gil_scoped_release release;
    k.row_forward(from, RowShape{rows, cols}, scale, shift, eps, to, to_mean, to_var);
  });
  m.def("row_backward", [](Array dy, Array x, size_t rows, size_t cols, Optional mean, Array var, double eps,
                           Optional gamma, py::array dx, Optional dgamma, Optional dbeta) {
    const Kernels& k = kernels_of(x);
    const void *grad = dy.data(), *from = x.data(), *scale = optional(gamma);
    const double *centre = static_cast<const double*>(optional(mean)), *spread = reals(var);
    void* to = dx.mutable_data();
    double *to_gamma = optional_out(dgamma), *to_beta = optional_out(dbeta);
    const py::gil_scoped_release release;
    k.row_backward(grad, from, RowShape{rows, cols}, centre, spread, eps, scale, to, to_gamma, to_beta);
  });
}

void register_dropout(py::module_& m) {
  m.def("dropout", [](Array x, size_t n, std::uint64_t first, std::uint64_t seed, std::uint64_t threshold, double scale,
                      py::array y) {
    const Kernels& k = kernels_of(x);
    const void* from = x.data();
    void* to = y.mutable_data();
    const py::gil_scoped_release release;
    k.dropout(from, n, first, seed, threshold, scale, to);
  });
}

// Floats of equally large arrays, for the memory roof.
size_t common_floats(Array a, Array b) {
  if (a.nbytes() != b.nbytes() || a.nbytes() % static_cast<py::ssize_t>(sizeof(float)) != 0)
    throw std::invalid_argument("expected arrays of one size, a multiple of 4 bytes");
  return static_cast<size_t>(a.nbytes()) / sizeof(float);
}

// Plans as dictionaries, distances in bytes. `shape` is that of what is cut up, `ahead` in elements.
py::dict described(const fastnorm::ChannelPlan& plan, const ChannelShape& shape, size_t ahead, size_t itemsize,
                   size_t arrays) {
  const fastnorm::Cut cut = fastnorm::cut_channels(shape);
  py::dict result;
  result["side_by_side"] = cut.side_by_side;
  result["fold"] = cut.fold;
  result["groups"] = cut.groups;
  result["serial"] = plan.serial;
  result["team"] = plan.team;
  result["slab"] = plan.slab;
  result["slab_bytes"] = plan.slab * shape.outer * shape.inner * itemsize * arrays;
  result["stream"] = plan.stream;
  result["ahead"] = ahead * itemsize;
  result["passes"] = plan.passes;
  return result;
}

py::dict described(const fastnorm::RowPlan& plan, size_t cols, size_t itemsize, size_t arrays) {
  py::dict result;
  result["side_by_side"] = false;
  result["groups"] = (cols + fastnorm::kChunk - 1) / fastnorm::kChunk;
  result["serial"] = plan.serial;
  result["team"] = plan.team;
  result["slab"] = plan.rows;
  result["slab_bytes"] = plan.rows * cols * itemsize * arrays;
  result["stream"] = plan.stream;
  result["ahead"] = plan.ahead * itemsize;
  result["passes"] = plan.passes;
  return result;
}

void register_plan(py::module_& m) {
  m.def("plan_channels", [](size_t outer, size_t channels, size_t inner, size_t itemsize, size_t arrays, int threads) {
    const ChannelShape shape{outer, channels, inner};
    const fastnorm::ChannelPlan plan = fastnorm::plan_channels(shape, itemsize, arrays, threads);
    const size_t ahead = plan.slab < channels && plan.passes == 1 ? plan.slab * inner : 0;
    return described(plan, shape, ahead, itemsize, arrays);
  });
  m.def("plan_groups", [](size_t samples, size_t outer, size_t channels, size_t inner, size_t groups, size_t itemsize,
                          size_t arrays, int threads) {
    const GroupShape shape{samples, outer, channels, inner, groups};
    if (shape.is_row()) {
      const fastnorm::RowPlan rows = fastnorm::plan_rows(RowShape{samples, channels}, itemsize, arrays, threads);
      py::dict result = described(rows, channels, itemsize, arrays);
      result["slab"] = rows.rows * channels;
      return result;
    }
    const fastnorm::ChannelPlan plan = fastnorm::plan_groups(shape, itemsize, arrays, threads);
    const size_t to_next = plan.slab * (plan.slab < channels ? 1 : outer) * inner;
    const size_t ahead = plan.slab < samples * channels && plan.passes == 1 ? to_next : 0;
    return described(plan, shape.sample(), ahead, itemsize, arrays);
  });
  m.def("plan_rows", [](size_t rows, size_t cols, size_t itemsize, size_t arrays, int threads) {
    return described(fastnorm::plan_rows(RowShape{rows, cols}, itemsize, arrays, threads), cols, itemsize, arrays);
  });
  m.def("plan_dropout", [](size_t elements, size_t itemsize) {
    const fastnorm::DropoutPlan plan = fastnorm::plan_dropout(elements, itemsize);
    py::dict result;
    result["side_by_side"] = false;
    result["groups"] = 0;
    result["serial"] = plan.tasks <= 1;
    result["team"] = false;
    result["slab"] = std::min(plan.task, elements);
    result["slab_bytes"] = std::min(plan.task, elements) * itemsize;
    result["stream"] = plan.stream;
    result["ahead"] = plan.ahead * itemsize;
    result["passes"] = 1;
    return result;
  });
}

void register_machine(py::module_& m) {
  m.def("stream_read", [](Array src) {
    const size_t n = common_floats(src, src);
    const auto* from = static_cast<const float*>(src.data());
    const py::gil_scoped_release release;
    fastnorm::level().stream_read(from, n);
  });
  m.def("stream_copy", [](Array src, py::array dst) {
    const size_t n = common_floats(src, dst);
    const auto* from = static_cast<const float*>(src.data());
    auto* to = static_cast<float*>(dst.mutable_data());
    const py::gil_scoped_release release;
    fastnorm::level().stream_copy(from, to, n);
  });
  m.def("stream_add", [](Array a, Array b, py::array dst) {
    const size_t n = common_floats(a, dst);
    common_floats(b, dst);
    const auto *first = static_cast<const float*>(a.data()), *second = static_cast<const float*>(b.data());
    auto* to = static_cast<float*>(dst.mutable_data());
    const py::gil_scoped_release release;
    fastnorm::level().stream_add(first, second, to, n);
  });
  m.def("isa", [] { return std::string(fastnorm::level().name); });
  m.def("isas", [] {
    py::list names;
    for (const auto* level : fastnorm::levels()) names.append(level->name);
    return names;
  });
  m.def("set_isa", &fastnorm::choose_level);
  m.def("set_num_threads", &fastnorm::set_num_threads);
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = FASTNORM_COMPILER;
    info["threading"] = fastnorm::threading();
    info["l2"] = fastnorm::caches().l2;
    info["l3"] = fastnorm::caches().l3;
    return info;
  });
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of fastnorm; the contract stands in fastnorm.backends.KernelTable.";
  fastnorm::prepare_for_fork();
  if (const char* wanted = std::getenv("FASTNORM_ISA"); wanted != nullptr && *wanted != '\0') {
    try {
      fastnorm::choose_level(wanted);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("FASTNORM_ISA: ") + error.what());
    }
  }
  register_channel(m);
  register_group(m);
  register_row(m);
  register_dropout(m);
  register_plan(m);
  register_machine(m);
  register_copies(m);
  register_memory(m);
  register_plain(m);
  register_vectors(m);
}
