"""Private interfaces of other libraries, one file per library; `tests/compat` fails by name when one changes."""
