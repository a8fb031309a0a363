"""Functions for a module with a new `forward`: update the references of hooks, and register its class with caches.

Hooks of diffusers and accelerate keep references to `forward`; caches of diffusers look up the class of a block. The
functions use private symbols of these libraries and are therefore in `postgen.compat`. Methods import them from here.
"""

from __future__ import annotations

from postgen.compat import rebind_forward, register_block_class

__all__ = ["rebind_forward", "register_block_class"]
