"""Applications on top of the library. Import as `postgen.apps`; none exists yet."""
