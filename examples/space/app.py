"""The app of postgen as a Hugging Face Space, which gives the address to listen at in its environment."""

from pathlib import Path

from postgen.apps.demo import build
from postgen.apps.guard import guarded
from postgen.apps.looks import launch_looks
from postgen.apps.settings import AppSettings

# A Space has names of its own, and is open to whoever finds it: which name was used protects nothing.
settings = AppSettings(outputs=Path("videos"), waiting=20, upload_bytes=16 * 2**20, allow_hosts=("*",))
demo = build(settings)  # the name by which a Space finds it

if __name__ == "__main__":
    # `postgen.apps.demo.launch` listens to other machines with a password only. A Space is open to all, and holds
    # nothing but this.
    demo.launch(
        share=False,
        show_error=True,
        ssr_mode=False,
        max_file_size=settings.upload_bytes,
        **guarded(settings),
        **launch_looks(settings.theme),
    )
