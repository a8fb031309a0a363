"""Drop-in diffusers pipeline classes, one file per model family. Import as `postgen.pipelines`; none exists yet."""
