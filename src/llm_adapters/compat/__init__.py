"""Private interfaces of other libraries, one module for each library, so that an upgrade breaks one place."""
