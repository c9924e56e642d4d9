from backend_fixtures import functions, one_thread  # noqa: F401 -- fixtures
