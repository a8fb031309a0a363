"""Browser tests. The folder is a package, so that package-scoped fixtures end with its last test."""
