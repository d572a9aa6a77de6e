"""The tiny server, for the fault tests as well."""

from tests.e2e.conftest import tiny_path, tiny_serve, tiny_server

__all__ = ["tiny_path", "tiny_serve", "tiny_server"]
