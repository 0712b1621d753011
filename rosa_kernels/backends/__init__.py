"""One module a backend, each with the ops of ops.py under the same names."""
