"""Applications on top of the library. Import as `postgen.apps`: `postgen.apps.demo` is the Gradio app."""
