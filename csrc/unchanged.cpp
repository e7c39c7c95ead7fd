// Whether Python objects are still what they were: the check before every call of a fused module, of a few
// nanoseconds an attribute.
#include "unchanged.h"

namespace r2r {

namespace {

// Whether a dict or a list holds the same objects as its snapshot. The snapshot of a dict is a tuple (key, value, key, value,
// ...); another order of the keys counts as a change. The snapshot of a list is a tuple of its objects.
bool same(PyObject* now, PyObject* snapshot) {
  if (!PyTuple_CheckExact(snapshot)) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(snapshot);
  if (PyList_Check(now)) {
    if (PyList_GET_SIZE(now) != size) return false;
    for (Py_ssize_t i = 0; i < size; i++) {
      if (PyList_GET_ITEM(now, i) != PyTuple_GET_ITEM(snapshot, i)) return false;
    }
    return true;
  }
  if (!PyDict_Check(now) || 2 * PyDict_GET_SIZE(now) != size) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; i < size; i += 2) {
    if (!PyDict_Next(now, &at, &key, &value)) return false;
    if (key != PyTuple_GET_ITEM(snapshot, i) || value != PyTuple_GET_ITEM(snapshot, i + 1)) return false;
  }
  return true;
}

// Six tuples; see the method's documentation.
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t TUPLES = 6;
  for (Py_ssize_t i = 0; i < TUPLES; i++) {
    if (count != TUPLES || !PyTuple_CheckExact(arguments[i])) {
      PyErr_SetString(PyExc_TypeError, "unchanged takes six tuples");
      return nullptr;
    }
  }
  PyObject *objects = arguments[0], *types = arguments[1], *dicts = arguments[2], *snapshots = arguments[3];
  PyObject *classes = arguments[4], *forwards = arguments[5];
  if (PyTuple_GET_SIZE(objects) != PyTuple_GET_SIZE(types) || PyTuple_GET_SIZE(dicts) != PyTuple_GET_SIZE(snapshots) ||
      PyTuple_GET_SIZE(classes) != PyTuple_GET_SIZE(forwards)) {
    PyErr_SetString(PyExc_ValueError, "each object has a type, each dict a snapshot, each class a forward");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); i++) {
    if ((PyObject*)Py_TYPE(PyTuple_GET_ITEM(objects, i)) != PyTuple_GET_ITEM(types, i)) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); i++) {
    if (!same(PyTuple_GET_ITEM(dicts, i), PyTuple_GET_ITEM(snapshots, i))) Py_RETURN_FALSE;
  }
  static PyObject* const name = PyUnicode_InternFromString("forward");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); i++) {
    PyObject* forward = PyObject_GetAttr(PyTuple_GET_ITEM(classes, i), name);
    if (!forward) return nullptr;
    Py_DECREF(forward);
    if (forward != PyTuple_GET_ITEM(forwards, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"unchanged", (PyCFunction)(void (*)())unchanged, METH_FASTCALL,
     "unchanged(objects, types, dicts, snapshots, classes, forwards): whether all objects have their types, all dicts and "
     "lists the objects of their snapshots, all classes their function `forward`."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_unchanged(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace r2r
