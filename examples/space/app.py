"""The app of postgen as a Hugging Face Space. The environment of the Space defines the address of the server."""

from pathlib import Path

from postgen.apps.demo import build
from postgen.apps.guard import guarded
from postgen.apps.looks import launch_looks
from postgen.apps.settings import AppSettings

# A Space is public and has its own host names, so checking the host name of a request would protect nothing.
settings = AppSettings(outputs=Path("videos"), waiting=20, upload_bytes=16 * 2**20, allow_hosts=("*",))
demo = build(settings)  # a Space looks for the name `demo`

if __name__ == "__main__":
    # `postgen.apps.demo.launch` accepts other machines only with a password. A Space needs no password: it is public
    # and holds only this app.
    demo.launch(
        share=False,
        show_error=True,
        ssr_mode=False,
        max_file_size=settings.upload_bytes,
        **guarded(settings),
        **launch_looks(settings.theme),
    )
