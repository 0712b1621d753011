"""A folder or file for each backend, with the ops of ops.py under the same names."""
