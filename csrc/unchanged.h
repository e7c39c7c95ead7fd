// The function `unchanged` of the module r2r_kernels._C.
#pragma once

#include <Python.h>

namespace r2r {

bool add_unchanged(PyObject* module);  // false, with a Python error set, where that failed

}  // namespace r2r
