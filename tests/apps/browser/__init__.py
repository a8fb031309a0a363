"""Tests in a browser: a package, so that fixtures of its scope end with the last of them."""
