"""Published claims put to the test: one module a table, and what each found beside it."""
