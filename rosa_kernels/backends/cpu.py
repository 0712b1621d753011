"""The C++ kernels."""


def unavailable_reason():
    return "not built yet"
