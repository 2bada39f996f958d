// What the bindings ask of NumPy's arrays.
#pragma once

#include <pybind11/numpy.h>

#include <cstring>

// What kernels store: float16, ml_dtypes' bfloat16, float32, float64.
inline constexpr const char* kStorage = "eEfd";

// Exactly an ndarray, aligned, of one of these dtypes, by their characters, in native order.
inline bool is_simple(pybind11::handle object, const char* dtypes) {
  namespace py = pybind11;
  auto& api = py::detail::npy_api::get();
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(api.PyArray_Type_)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const auto dtype = array.dtype();
  return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 &&
         std::strchr(dtypes, dtype.char_()) != nullptr && (dtype.byteorder() == '=' || dtype.byteorder() == '|');
}

inline bool c_contiguous(const pybind11::array& array) { return (array.flags() & pybind11::array::c_style) != 0; }

inline bool is_plain(pybind11::handle object, const char* dtypes) {
  return is_simple(object, dtypes) && c_contiguous(pybind11::reinterpret_borrow<pybind11::array>(object));
}

// A vector: plain, of one dimension, of float32 or float64; of so many numbers.
inline bool is_vector(pybind11::handle object, pybind11::ssize_t length, const char* dtypes = "fd") {
  if (!is_plain(object, dtypes)) return false;
  const auto array = pybind11::reinterpret_borrow<pybind11::array>(object);
  return array.ndim() == 1 && array.shape(0) == length;
}
