"""What pytest leaves out here."""

# Its tests are run by `test_write_a_backend.py`, in an environment of their own.
collect_ignore = ["tiny_openai"]
